"""Allocations: which matrix gets which pattern, the budget met by parameters. One file each; `facts` lists them."""
