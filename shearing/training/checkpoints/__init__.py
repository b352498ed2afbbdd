"""Checkpoints: whole or absent, verified, and readable by any number of processes."""
