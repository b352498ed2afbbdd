"""Weights that stay make up for the units that go, before training: by least squares, then block by block."""
