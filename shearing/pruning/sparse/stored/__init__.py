"""Sparse models on disk: layers while they are made, masks, manifest, and their checks."""
