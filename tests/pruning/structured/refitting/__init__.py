"""Weights that make up for the units that go."""
