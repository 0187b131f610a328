"""Training steps: the shapes of their models, what a step does, what it should cost."""
