"""How steps are computed and state is kept: plain torch, DeepSpeed, or FSDP2."""
