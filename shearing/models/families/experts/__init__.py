"""Families whose MLPs are experts: what they declare, and how experts are computed under masks and cut."""
