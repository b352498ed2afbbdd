"""`shear search`: shapes at a budget, each cut and trained a little, raced by successive halving."""
