"""Tokenised domains on disk."""
