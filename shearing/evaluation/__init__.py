"""What a model is worth: held-out loss per domain, bits per byte, speed, and the table of a run."""
