"""Estimators: how the masks of a step come out of what is learned, and how the loss moves that. One file each."""
