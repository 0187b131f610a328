"""Whether what a call of modules computes can be told from their weights and slices alone."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from s2kernels.autograd.checks import is_autocast
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.s2ft.layer import S2FTLayer
from s2kernels.peft.s2ft.linear import S2FTLinear


def sole_active_adapter(layers: Sequence[S2FTLayer]) -> str | None:
    """The only adapter that is active in any of the layers, if it is to be fused."""
    if any(layer.disable_adapters or layer.merged for layer in layers):
        return None
    names = {name for layer in layers for name in layer.active()}
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
    premises = Premises()
    premises.bare(module)
    return premises.hold()


def is_silu(activation: nn.Module) -> bool:
    """Whether a call computes silu; transformers has a class of its own for it."""
    kind = type(activation)
    known = kind is nn.SiLU or (kind.__module__, kind.__name__) == (
        "transformers.activations",
        "SiLUActivation",
    )
    return known and is_bare(activation)


def are_alike(weights: Sequence[Tensor]) -> bool:
    """Whether all weights are plain, frozen, of one dtype and on one device.

    A parameter under FakeTensorMode stands for a plain one.
    """
    first = weights[0]
    return all(
        type(weight) in (nn.Parameter, FakeTensor)
        and not weight.requires_grad
        and weight.is_floating_point()
        and weight.dtype == first.dtype
        and weight.device == first.device
        for weight in weights
    )


def weights_match_input(weight: Tensor, x: Tensor) -> bool:
    """Whether torch.nn.Linear would multiply x with the weight as they are."""
    return (x.dtype == weight.dtype or is_autocast(x)) and x.device == weight.device


def note_bare_linear(premises: Premises, module: nn.Module) -> None:
    """Note what `linear_behind` looks at, and that the weights stay frozen where they lie."""
    premises.bare(module)
    if isinstance(module, S2FTLinear):
        premises.same_child(module, "base_layer")
        module = module.base_layer
        premises.bare(module)
    for name in ("weight", "bias"):
        premises.same_tensor(module, name)
    if isinstance(module, nn.Linear):
        premises.as_trainable(module.weight)
        premises.unmoved(module.weight)
