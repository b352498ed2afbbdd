"""Importance by what the writes of a sub-layer read: statistics of the inputs of `o_proj` and `down_proj`."""
