"""What applies to every method alike: checkpointing, liger-kernel, attention, torch.compile."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel


class Unavailable(RuntimeError):
    """A method or an option that cannot run here; the message says why."""


# attention: eager, SDPA with the backend that torch chooses, or held to one of its backends
ATTENTION = {
    "eager": None,
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_GPU_ONLY = ("cudnn", "efficient")


@dataclass(frozen=True)
class Options:
    """Raises ValueError for an attention that is not in ATTENTION."""

    # of whole blocks, the non-reentrant kind; transformers then asks for dx down to the embedding
    checkpointing: bool = False
    liger: bool = False  # RMSNorm, RoPE, and the cross entropy fused with the head
    attention: str = "sdpa"
    compile: bool = False  # torch.compile of the model's forward, and so of its backward
    full_depth: bool = False  # dx down to the embedding's output, as the frozen floor computes it

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {list(ATTENTION)}, got {self.attention!r}")

    def check(self, device: torch.device) -> None:
        """Raises Unavailable for what `device` or this environment lacks."""
        if self.liger and device.type != "cuda":
            raise Unavailable("liger-kernel needs a GPU")
        if self.liger:
            require("liger_kernel", "liger-kernel")
        if self.attention in _GPU_ONLY and device.type != "cuda":
            raise Unavailable(f"attention {self.attention} needs a GPU")

    def before(self, model: PreTrainedModel) -> None:
        """What is changed in the model before a method attaches to it."""
        model.set_attn_implementation("eager" if self.attention == "eager" else "sdpa")
        if self.liger:
            use_liger(model)

    def after(self, model: nn.Module, base: PreTrainedModel) -> None:
        """What is changed once the method is attached: `model` is what a step runs."""
        if self.checkpointing:
            with warnings.catch_warnings():  # older releases know it by this name alone
                warnings.simplefilter("ignore", FutureWarning)
                base.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile:
            model.compile()

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        """Around every forward and backward: what torch and transformers keep in global places."""
        with ExitStack() as stack:
            backend = ATTENTION[self.attention]
            if backend is not None:
                stack.enter_context(sdpa_kernel(backend))
            if self.liger:
                stack.enter_context(_liger_rope(model))
            yield


def require(module: str, package: str) -> None:
    """Raises Unavailable where `module` cannot be found."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def use_liger(model: PreTrainedModel) -> None:
    """liger-kernel's RMSNorm and fused linear cross entropy, in this model alone.

    Its own apply_liger_kernel_to_* changes the classes of transformers, and with them every model
    that is built later, the frozen floor of another case among them.
    """
    from liger_kernel.transformers import LigerRMSNorm

    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            fused = LigerRMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
            fused.weight = norm.weight
            model.set_submodule(name, fused)
    own = importlib.import_module(f"liger_kernel.transformers.model.{model.config.model_type}")
    model.forward = MethodType(own.lce_forward, model)


@contextmanager
def _liger_rope(model: PreTrainedModel) -> Iterator[None]:
    """transformers looks the function up in the module of the model's class, at each call."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    module = sys.modules[type(model).__module__]
    before = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = liger_rotary_pos_emb
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = before
