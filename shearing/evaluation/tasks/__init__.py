"""Task sets of EleutherAI's lm-evaluation-harness (extra lm-eval): which, how they are run, what comes out."""
