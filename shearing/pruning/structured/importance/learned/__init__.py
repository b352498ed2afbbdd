"""Importance that is found by trying masks on the text, at the target shape and with frozen weights. One file each."""
