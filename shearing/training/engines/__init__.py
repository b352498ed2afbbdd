"""How steps are computed and state is kept: plain torch, or DeepSpeed."""
