"""Which sample comes next: the sampler over domains, and the rules that move their weights."""
