"""Before a run: whether it can work, what it takes, and whether it fits."""
