"""What a step of a training stage holds in memory: traced, by arithmetic, and of a whole stage."""
