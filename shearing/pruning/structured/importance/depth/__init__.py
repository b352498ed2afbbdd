"""Importance of layers and sub-layers alone: what a model is without them. One file each."""
