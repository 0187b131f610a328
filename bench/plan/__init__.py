"""What training on many GPUs takes on each of them, counted without one."""
