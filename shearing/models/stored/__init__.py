"""Models in folders: what is written beside the weights, how, and what is read of one without loading it."""
