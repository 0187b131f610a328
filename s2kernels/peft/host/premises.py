"""What prepared calls take for granted of modules and tensors, compared once a forward.

State of a tuner changes through its own methods, and `WeightKeeper.changes` counts these. What
others change without telling is found here: a module or parameter that was replaced, a hook that
was added, a buffer that was written to. Each is one comparison by identity or of a number.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from s2kernels.autograd.checks import version_of
from s2kernels.peft.host.kept_buffers import has_values

# torch calls these around every module
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks_always_called,
    torch_module._global_forward_hooks_with_kwargs,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Premises:
    """Facts, each once; `hold` says whether all of them are still true."""

    __slots__ = ("_addresses", "_empty", "_same", "_trainable", "_versions")

    def __init__(self) -> None:
        self._same: dict[tuple, tuple[Mapping[str, Any], str, Any]] = {}
        self._empty: dict[int, Mapping] = {}
        self._trainable: dict[tuple, tuple[Tensor, bool]] = {}
        self._versions: dict[tuple, tuple[Tensor, int]] = {}
        self._addresses: dict[tuple, tuple[Tensor, int]] = {}

    def include(self, others: "Premises") -> None:
        """Note all that others hold, too."""
        for name in self.__slots__:
            getattr(self, name).update(getattr(others, name))

    def hold(self) -> bool:
        """Whether everything is as it was when it was noted."""
        for owner, key, value in self._same.values():
            if owner.get(key) is not value:
                return False
        if any(self._empty.values()):
            return False
        for tensor, trainable in self._trainable.values():
            if tensor.requires_grad is not trainable:
                return False
        for tensor, version in self._versions.values():
            if tensor._version != version:
                return False
        for tensor, address in self._addresses.values():
            if tensor.data_ptr() != address:
                return False
        return True

    def _are_empty(self, hooks: Iterable[Mapping]) -> None:
        self._empty.update((id(each), each) for each in hooks)

    def _note(self, owner: Mapping[str, Any], key: str, value: Any) -> None:
        # twice with two values, it is two facts, which do not both hold
        self._same[id(owner), key, id(value)] = owner, key, value

    def same_child(self, module: nn.Module, name: str) -> None:
        """The child module under that name is the one that it is now."""
        self._note(module._modules, name, module._modules.get(name))

    def same_tensor(self, module: nn.Module, name: str) -> None:
        """The parameter or buffer under that name is the one that it is now."""
        owner = module._parameters if name in module._parameters else module._buffers
        self._note(owner, name, owner.get(name))

    def same_attribute(self, owner: object, name: str) -> None:
        """The attribute is the very object that it is now."""
        self._note(vars(owner), name, vars(owner).get(name))

    def as_partitioned(self, tensor: Tensor) -> None:
        """DeepSpeed ZeRO-3, which keeps the tensor object, has partitioned it if it has now."""
        self._note(vars(tensor), "ds_id", vars(tensor).get("ds_id"))

    def bare(self, module: nn.Module) -> None:
        """A call of the module runs the forward of its class, without hooks of its own."""
        self._note(vars(module), "forward", None)
        self._are_empty(vars(module)[name] for name in _OWN_HOOKS)

    def unwatched(self) -> None:
        """No hooks are set on the calls of all modules."""
        self._are_empty(GLOBAL_HOOKS)

    def as_trainable(self, tensor: Tensor) -> None:
        """The tensor gets a gradient if it gets one now."""
        fact = tensor.requires_grad
        self._trainable[id(tensor), fact] = tensor, fact

    def unwritten(self, tensor: Tensor) -> None:
        """Nothing is written into the tensor. One of inference mode does not count writes."""
        if not tensor.is_inference():
            version = version_of(tensor)
            self._versions[id(tensor), version] = tensor, version

    def unmoved(self, tensor: Tensor) -> None:
        """The tensor stays where it lies in memory."""
        if has_values(tensor):
            address = tensor.data_ptr()
            self._addresses[id(tensor), address] = tensor, address
