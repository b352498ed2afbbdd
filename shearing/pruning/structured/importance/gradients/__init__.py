"""Importance by what the loss says of weights: its gradients, one sum for each unit."""
