"""Models whose weights stay in their files: until an engine takes them, or while a layer is read."""
