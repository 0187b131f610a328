"""Looking into a running model: what goes through its linear layers, its experts, its gradients.

Nothing of the model is changed for longer than a `with` block.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from s2kernels.architectures import Member
from s2kernels.autograd.experts import Routing, expert_linear, experts_forward
from s2kernels.coupling import Structure, base_layer, parameter

Target: TypeAlias = tuple[Structure, Member]
Observer: TypeAlias = Callable[[Tensor, Tensor], None]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and none of its parameters requires a gradient.

    Afterwards, also after an exception, the training mode of every module, requires_grad of every
    parameter and the random states of torch (CPU and CUDA) and Python are what they were.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [value for value in model.parameters() if value.requires_grad]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    random_state = random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module in training:  # not eval(): that changes the children too
                module.training = False
            for value in trainable:
                value.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for value in trainable:
                value.requires_grad_(True)
            random.setstate(random_state)


@contextmanager
def observed(
    model: nn.Module, targets: list[Target], observer: Callable[[Structure, Member], Observer]
) -> Iterator[None]:
    """Inside, every input x and output y of the linear layers `targets` go to their observers."""

    def hook(observe: Observer) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, y: observe(args[0], y)

    with ExitStack() as stack:
        for structure, member in targets:
            # The tuner layer, if one is there: it need not call the layer that it wraps, and input
            # and output are the same.
            layer = layer_of(model, structure, member)
            handle = layer.register_forward_hook(hook(observer(structure, member)))
            stack.callback(handle.remove)
        yield


@contextmanager
def observed_experts(
    model: nn.Module,
    targets: list[Target],
    observer: Callable[[Structure, Member, Tensor, Routing], None],
) -> Iterator[None]:
    """Inside, what each of the experts' tensors `targets` is multiplied with goes to `observer`:
    the pairs (S, F) of `s2kernels.autograd.experts`, whose forward the experts have meanwhile.

    Raises ValueError where an adapter wraps the experts: their forward is then not the model's.
    """

    def forward(
        module: Any, target: Target, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        def down(h: Tensor, routing: Routing) -> Tensor:
            observer(*target, h, routing)
            return expert_linear(h, module.down_proj, routing, from_tokens=False)

        gate_up = partial(expert_linear, weight=module.gate_up_proj, from_tokens=True)
        return experts_forward(
            module,
            *(x, top_k_index, top_k_weights),
            gate_up=lambda x, routing: gate_up(x, routing=routing),
            down=down,
        )

    with ExitStack() as stack:
        for structure, member in targets:
            module = base_layer(model, structure.name)
            if module is not model.get_submodule(structure.name):
                raise ValueError(
                    f"{structure.name} has an adapter, through which the activations of experts "
                    "are not seen: select before it is added"
                )
            own = vars(module).get("forward")  # that of accelerate, say
            stack.callback(_restore_forward, module, own)
            module.forward = partial(forward, module, (structure, member))
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


@contextmanager
def observed_gradients(
    model: nn.Module, targets: list[Target], observer: Callable[[Structure, Member, Tensor], None]
) -> Iterator[None]:
    """Inside, the gradients of the expert tensors `targets` go to `observer`, and are freed.

    Nobody sees the inputs and outputs of experts, whose weights are slices of one tensor.
    """

    def hook(structure: Structure, member: Member) -> Callable[[Tensor], None]:
        def on_gradient(value: Tensor) -> None:
            if value.grad is not None:
                observer(structure, member, value.grad)
            value.grad = None

        return on_gradient

    with ExitStack() as stack:
        for structure, member in targets:
            value = parameter(model, structure, member)
            stack.callback(setattr, value, "grad", value.grad)
            stack.callback(value.requires_grad_, False)
            value.grad = None
            value.requires_grad_()
            handle = value.register_post_accumulate_grad_hook(hook(structure, member))
            stack.callback(handle.remove)
        yield


def layer_of(model: nn.Module, structure: Structure, member: Member) -> nn.Module:
    """The module that holds `member`, or the tuner layer around it."""
    return model.get_submodule(f"{structure.name}.{member.suffix}".rpartition(".")[0])
