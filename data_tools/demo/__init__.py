"""The demo's model and text, out of packages of the Python package index."""
