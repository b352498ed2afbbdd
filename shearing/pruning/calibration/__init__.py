"""What pruning learns from text: which text, the walk through the layers, and the statistics of their inputs."""
