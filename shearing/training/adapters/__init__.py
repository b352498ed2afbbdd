"""Few parameters that are trained in place of all weights, and merged in the end; zeros stay zeros. One file a kind."""
