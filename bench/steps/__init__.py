"""Training steps of every method: which are measured, how, and what they cost."""
