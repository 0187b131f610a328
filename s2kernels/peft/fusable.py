"""Whether what a call of modules computes can be told from their weights and slices alone."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from s2kernels.autograd.checks import is_autocast
from s2kernels.peft.layer import S2FTLayer
from s2kernels.peft.linear import S2FTLinear


def is_watched() -> bool:
    """Whether there are hooks on the calls of all modules."""
    return bool(_has_any_global_hook())


def one_adapter(layers: Sequence[S2FTLayer]) -> str | None:
    """The only adapter that is active in any of the layers, if it is to be fused."""
    names: set[str] = set()
    for layer in layers:
        if layer.disable_adapters or layer.merged or layer.base_weights.adapter_names is not None:
            return None
        names |= {name for name in layer.active_adapters if name in layer.s2ft_delta}
    if len(names) != 1:
        return None
    (name,) = names
    return name if all(layer.fuse.get(name, True) for layer in layers) else None


def linear_behind(module: nn.Module) -> nn.Linear | None:
    """The torch.nn.Linear that a call of the module runs, with its slice and nothing else."""
    if type(module) is nn.Linear:
        return module if is_bare(module) else None
    base = module.base_layer if isinstance(module, S2FTLinear) else None
    return base if type(base) is nn.Linear and is_bare(module) and is_bare(base) else None


def is_bare(module: nn.Module) -> bool:
    """Whether a call runs the forward of the class alone, hooks of all modules aside."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether there are hooks on the calls of this very module."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def is_silu(activation: nn.Module) -> bool:
    """Whether a call computes silu; transformers has a class of its own for it."""
    kind = type(activation)
    known = kind is nn.SiLU or (kind.__module__, kind.__name__) == (
        "transformers.activations",
        "SiLUActivation",
    )
    return known and is_bare(activation)


def fit(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all weights are plain, frozen, and what torch.nn.Linear would multiply x with."""
    first = weights[0]
    same = is_autocast(x) or x.dtype == first.dtype
    return same and x.device == first.device and are_alike(weights)


def are_alike(weights: Sequence[Tensor]) -> bool:
    """Whether all weights are plain, frozen, of one dtype and on one device."""
    first = weights[0]
    return all(
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.is_floating_point()
        and weight.dtype == first.dtype
        and weight.device == first.device
        for weight in weights
    )
