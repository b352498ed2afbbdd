"""Allocations: which matrix gets which pattern. One file each, one interface; the budget is met by parameters."""
