"""The search of mixed sparsity pruning (arXiv 2503.11164, reconstructed): which unit gets which level, by evolution.

genome       what a candidate is, and how candidates are varied within the budget
population   the first candidates, from sensitivity
database     every matrix at every level, so that a candidate costs one forward pass
fitness      what a candidate is worth
evolution    generation by generation
"""
