"""What the last stage measures: the models of a run, and beside their held-out losses tasks and writing."""
