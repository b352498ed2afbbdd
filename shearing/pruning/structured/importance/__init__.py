"""Importance: which units matter most. One file each."""
