"""Reference losses of domains: measured, predicted by a power law of model size, kept in a table."""
