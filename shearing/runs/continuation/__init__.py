"""How a run goes on: with the same recipe, with other keys, as another run from a checkpoint, in several sizes."""
