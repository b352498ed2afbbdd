"""How a run goes on: with the same recipe, with other keys, or as another run from a checkpoint."""
