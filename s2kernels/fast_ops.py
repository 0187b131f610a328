"""Faster norms, rotary embeddings, loss and attention for a transformers model: not ours, but what
a step of S2FT spends most of its time in beside the dense GEMMs.

    rms_norm       liger-kernel's RMSNorm: one kernel a direction, saves its input
    block          liger-kernel's RMSNorm with the addition before it, and our SwiGLU, in the blocks
                   of Llama and its kin (`s2kernels.fast_blocks`)
    rope           liger-kernel's rotary embedding: q and k in one kernel, saves neither
    cross_entropy  liger-kernel's, fused with the head: in training no logits are ever whole
    attention      torch's SDPA, by cuDNN for shapes that come again

Each is switched on in the one model that is given, where it is known to be right and to pay: on
CUDA, for a model type whose norms are known, attention on sm_90 alone (in the measurements of
transformers cuDNN was faster than Flash on H100, and slower on A100 and Blackwell), and only where
torch does not take cuDNN by itself, which newer releases do there.
Results differ by the rounding of the dtype. The SwiGLU of a FFN with trained slices stays that of
`s2kernels.autograd.s2_mlp`, which knows about them.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from s2kernels.attention import Choice, sdpa, torch_choice
from s2kernels.capturing import is_capturing, is_rehearsing
from s2kernels.fast_blocks import LIKE_LLAMA, FastBlock, Handed

OPS = ("rms_norm", "block", "rope", "cross_entropy", "attention")

CUDNN = "s2_cudnn"  # our name among the attention implementations of transformers
_HALF = (torch.bfloat16, torch.float16)

# model type -> module of liger-kernel, its forward of the whole model
_FORWARDS = {
    "llama": ("llama", "lce_forward"),
    "mistral": ("mistral", "lce_forward"),
    "qwen2": ("qwen2", "lce_forward"),
    "qwen3": ("qwen3", "lce_forward"),
    "gemma2": ("gemma2", "lce_forward"),
    "gemma3_text": ("gemma3", "causal_forward"),
    "phi3": ("phi3", "lce_forward"),
    "mixtral": ("mixtral", "lce_forward"),
    "qwen3_moe": ("qwen3_moe", "lce_forward"),
}
# Gemma scales by 1 + weight, in fp32 to the end; the others round x first, then scale by weight.
_NORMS = {"gemma2": (1.0, "gemma"), "gemma3_text": (1.0, "gemma")}
_NORM_OF_LLAMA = (0.0, "llama")


@dataclass
class FastOps:
    """What `use_fast_ops` did to a model.

    on    the ops that are switched on
    off   those that are not, and why
    sdpa  the backend that torch's SDPA takes without `attention`; None where the model does not
          use it
    """

    on: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)
    sdpa: Choice | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give the model back what it had."""
        while self._undo:
            self._undo.pop()()
        self.on = []

    def __enter__(self) -> "FastOps":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{op}: on" for op in self.on]
        lines += [f"{op}: off, {reason}" for op, reason in self.off.items()]
        return "\n".join(lines + ([] if self.sdpa is None else [str(self.sdpa)]))


def use_fast_ops(model: nn.Module, ops: Iterable[str] = OPS) -> FastOps:
    """Switch on, in this model alone, those of `ops` that it can have.

        print(s2kernels.use_fast_ops(model))

    model: of transformers, or a PeftModel around one, before or after its adapters were made. What
    is returned says what was done and why the rest was not; its undo(), or leaving a `with` block,
    takes it back.

    With cross_entropy a model in training mode that is given labels returns a loss and no logits.
    It is the model's own again in the steps of `s2kernels.capture`, and wherever else a CUDA graph
    is captured, since liger-kernel's waits for the device, and where the head has a hook or an
    adapter, since that reads the weight of it alone.

    attention pays for fixed lengths: cuDNN plans for each shape of a batch, and is taken for those
    that come again. Pad to a few lengths.

    Raises ValueError for an op that is not in OPS.
    """
    wanted = list(ops)
    for op in wanted:
        if op not in OPS:
            raise ValueError(f"ops must be among {', '.join(OPS)}, got {op!r}")
    given: Any = model
    base = given.get_base_model() if hasattr(given, "get_base_model") else given
    done = FastOps(sdpa=_sdpa_choice(base))
    switches = dict(zip(OPS, (_rms_norm, _block, _rope, _cross_entropy, _attention), strict=True))
    try:
        for op in wanted:
            reason = (_no_cudnn if op == "attention" else _no_liger)(base)
            reason = reason or switches[op](base, done._undo)
            if reason is None:
                done.on.append(op)
            else:
                done.off[op] = reason
    except BaseException:  # a liger-kernel that cannot be imported here
        done.undo()
        raise
    return done


def _no_liger(model: Any) -> str | None:
    """Why nothing of liger-kernel goes with the model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _FORWARDS:
        return f"the model type {kind!r} is not among {', '.join(_FORWARDS)}"
    if reason := _not_on_cuda(model):
        return reason
    if model.dtype == torch.float64:
        return "its kernels do not compute in fp64"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _no_cudnn(model: Any) -> str | None:
    """Why cuDNN's attention does not go with the model, or does not pay."""
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if config is None or implementation != "sdpa":
        return f"the attention implementation is {implementation!r}, not 'sdpa'"
    if reason := _not_on_cuda(model):
        return reason
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return "torch has no cuDNN here"
    if torch.cuda.get_device_capability(model.device) != (9, 0):
        return "cuDNN was found to be faster on sm_90 alone"
    if model.dtype not in _HALF:
        return f"cuDNN's attention is for half types, the model is in {model.dtype}"
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN wants a head_dim that 8 divides, of 128 at most, it is {head_dim}"
    if torch_choice(model).backend == SDPBackend.CUDNN_ATTENTION:
        return "torch takes cuDNN's by itself"
    return None


def _sdpa_choice(model: Any) -> Choice | None:
    config = getattr(model, "config", None)
    is_used = getattr(config, "_attn_implementation", None) == "sdpa"
    return torch_choice(model) if is_used and hasattr(config, "num_attention_heads") else None


def _not_on_cuda(model: Any) -> str | None:
    return None if model.device.type == "cuda" else f"the model is on the device {model.device}"


def _rms_norm(model: Any, undo: list[Callable[[], None]]) -> str | None:
    offset, casting = _NORMS.get(model.config.model_type, _NORM_OF_LLAMA)
    norms = [m for m in model.modules() if _is_own(m) and type(m).__name__.endswith("RMSNorm")]
    return _replace(norms, lambda norm: MethodType(_fast_norm(norm, offset, casting), norm), undo)


def _block(model: Any, undo: list[Callable[[], None]]) -> str | None:
    kind = model.config.model_type
    if kind not in LIKE_LLAMA:
        return f"the blocks of the model type {kind!r} are not among {', '.join(LIKE_LLAMA)}"
    blocks: list[Any] = [
        m for m in model.modules() if _is_own(m) and type(m).__name__.endswith("DecoderLayer")
    ]
    following = {
        block: behind.input_layernorm for block, behind in zip(blocks, blocks[1:], strict=False)
    }
    handed = Handed()
    return _replace(
        blocks, lambda block: FastBlock(block, following.get(block), handed, _add_norm), undo
    )


def _rope(model: Any, undo: list[Callable[[], None]]) -> str | None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    name = "apply_rotary_pos_emb"
    attentions = [m for m in model.modules() if _is_own(m) and _looks_up(type(m).forward, name)]
    kinds = {type(attention) for attention in attentions}
    changed = {kind: _with_global(kind.forward, name, liger_rotary_pos_emb) for kind in kinds}
    return _replace(attentions, lambda each: MethodType(changed[type(each)], each), undo)


def _cross_entropy(model: Any, undo: list[Callable[[], None]]) -> str | None:
    if not isinstance(getattr(model, "lm_head", None), nn.Module):
        return f"{type(model).__name__} has no lm_head"
    module, name = _FORWARDS[model.config.model_type]
    fused = getattr(importlib.import_module(f"liger_kernel.transformers.model.{module}"), name)
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain(self.lm_head) or is_rehearsing() or is_capturing():
            return own(self, *args, **kwargs)
        if self.lm_head.weight.requires_grad:  # or it would be summed over chunks in half precision
            kwargs["accum_dtype"] = torch.float32
        return fused(self, *args, **kwargs)

    # Trainer asks for it, to know which columns of a data set the model takes
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return _replace([model], lambda model: MethodType(forward, model), undo)


def _attention(model: Any, undo: list[Callable[[], None]]) -> str | None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(CUDNN, sdpa)
    AttentionMaskInterface.register(CUDNN, sdpa_mask)
    model.set_attn_implementation(CUDNN)
    undo.append(lambda: model.set_attn_implementation("sdpa"))
    return None


def _fast_norm(norm: Any, offset: float, casting: str) -> Callable:
    from liger_kernel.ops import LigerRMSNormFunction

    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        # Not in place, which writes dx over a dy that others may hold.
        return LigerRMSNormFunction.apply(x, self.weight, eps, offset, casting, False, None)

    return forward


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For `FastBlock`. Not in place either."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    offset, casting = _NORM_OF_LLAMA
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, casting, False)


def _looks_up(function: Any, name: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and name in code.co_names


def _with_global(function: Any, name: str, value: Any) -> FunctionType:
    """The function, but for one global name, which is another value to it: transformers looks the
    rotary embedding up in the module of the model's class, which all models of a type share.
    """
    changed = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _replace(
    modules: list[Any], make: Callable[[Any], Callable], undo: list[Callable[[], None]]
) -> str | None:
    """Give each module a forward of its own, unless one has been given such by somebody else.

    A forward with an attribute `inner` wraps another, by default (None) that of the class: the new
    one goes inside, as in a model whose weights an adapter is written into.
    """
    if not modules:
        return "the model has no such module"
    for module in modules:
        outer = vars(module).get("forward")
        if outer is not None and getattr(outer, "inner", outer) is not None:
            return f"the forward of a {type(module).__name__} has been replaced already"
    for module in modules:
        forward = make(module)
        if "forward" in vars(module):
            module.forward.inner = forward
        else:
            module.forward = forward
        undo.append(partial(_put_back, module, forward))
    return None


def _put_back(module: Any, forward: Callable) -> None:
    """Undo the replacement by `forward`, which something else may have wrapped since."""
    outer = vars(module).get("forward")
    if outer is forward:
        del module.forward
    elif getattr(outer, "inner", None) is forward:
        outer.inner = None  # type: ignore[union-attr]


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _is_plain(head: nn.Module) -> bool:
    hooks = head._forward_hooks, head._forward_pre_hooks
    return type(head) is nn.Linear and head.bias is None and not any(hooks)
