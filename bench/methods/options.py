"""What every method can be given: checkpointing, liger-kernel, attention, torch.compile."""

import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from s2kernels import use_fast_ops


class Unavailable(RuntimeError):
    """A method or an option that cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    """Raises ValueError for another attention than "sdpa" and "cudnn"."""

    # of whole blocks, the non-reentrant kind; transformers then asks for dx down to the embedding
    checkpointing: bool = False
    liger: bool = False  # all that `s2kernels.use_fast_ops` takes from liger-kernel
    attention: str = "sdpa"  # torch's choice of a backend; "cudnn": cuDNN first, by `use_fast_ops`
    compile: bool = False  # torch.compile of the model's forward, and so of its backward
    full_depth: bool = False  # dx down to the embedding's output, as the frozen floor computes it

    def __post_init__(self) -> None:
        if self.attention not in ("sdpa", "cudnn"):
            raise ValueError(f"attention must be one of 'sdpa', 'cudnn', got {self.attention!r}")

    def before(self, model: PreTrainedModel) -> None:
        """What is changed in the model before a method attaches to it.

        Raises Unavailable where the model cannot have it; the model is then as it was.
        """
        model.set_attn_implementation("sdpa")
        ops = ["rms_norm", "rope", "cross_entropy"] if self.liger else []
        if self.attention == "cudnn":
            ops.append("attention")
        if not ops:  # nor is torch asked which attention it takes: tensors may be without content
            return
        done = use_fast_ops(model, ops)
        if done.off:
            done.undo()
            raise Unavailable("; ".join(f"{op}: {reason}" for op, reason in done.off.items()))

    def after(self, model: nn.Module, base: PreTrainedModel) -> None:
        """What is changed once the method is attached: `model` is what a step runs."""
        if self.checkpointing:
            with warnings.catch_warnings():  # older releases know it by this name alone
                warnings.simplefilter("ignore", FutureWarning)
                base.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile:
            model.compile()
