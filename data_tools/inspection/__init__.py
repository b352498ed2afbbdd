"""What stands in a corpus: `shear data inspect` and `verify`."""
