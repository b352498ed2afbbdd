"""Files that are there whole or not at all: text, tensors, mapped arrays, results worth keeping."""
