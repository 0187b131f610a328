"""Sparse fine-tuning of language models on fused kernels: S2FT (arXiv 2412.06289).

Import the parts where they are used: `s2kernels.autograd` (Functions), `s2kernels.peft` (the PEFT
tuner), `s2kernels.kernels` (Triton) and `s2kernels.reference` (the same ops in plain torch).

Two calls around a training loop are here: `s2kernels.capture` makes a step one CUDA graph,
`s2kernels.use_fast_ops` gives a model faster norms, rotary embeddings, attention and loss.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2kernels.captured_step import capture as capture
    from s2kernels.fast_ops import use_fast_ops as use_fast_ops

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and the command line has answers that do without it.
    if name == "capture":
        from s2kernels.captured_step import capture

        return capture
    if name == "use_fast_ops":
        from s2kernels.fast_ops import use_fast_ops

        return use_fast_ops
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
