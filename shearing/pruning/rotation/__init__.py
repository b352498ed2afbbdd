"""The residual stream in another basis, before its dimensions are cut: the same function, other coordinates."""
