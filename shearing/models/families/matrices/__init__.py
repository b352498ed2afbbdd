"""Families with other matrices than Llama's: fused ones, an MLP without a gate, biases of their own."""
