"""What the methods learn, keep and forget on a language model, and the theory of the paper."""
