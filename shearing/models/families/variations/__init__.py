"""Families with Llama's matrices and other norms, scales or positions."""
