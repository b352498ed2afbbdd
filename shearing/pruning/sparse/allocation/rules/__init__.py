"""Allocations that follow from scores by a formula. One file each; `allocation.facts` lists them."""
