"""Sparse fine-tuning of language models on fused kernels: S2FT (arXiv 2412.06289).

Import the parts where they are used: `s2kernels.autograd` (Functions), `s2kernels.peft` (the PEFT
tuner), `s2kernels.kernels` (Triton) and `s2kernels.reference` (the same ops in plain torch).
"""

__version__ = "0.1.0"
