"""Runs real code without computing anything, and counts what it would have to do.

Under a `DryRun` an operator of torch that touches a large tensor of floats returns a tensor of the
right size without computing its numbers. Torch's meta kernels say what size that is. The tensors
are ordinary ones on the CPU, in memory that nothing ever touches. FakeTensors would not do: a tuner
asks for plain Parameters before it writes into them, as it should. Everything else happens for
real: indices are drawn and looked up, autograd builds its graph and frees what it has saved.

Counted, operator by operator:

    FLOPs   by the formulas of torch's FlopCounterMode, and `work.FORMULAS` for what it leaves out
    bytes   operands are read, results written, once each; `work.moved` has the exceptions
    alive   the storages that operators allocated and that are not yet freed, in bytes
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.memory import dense_parts
from bench.measure.memory import tensors as _tensors
from bench.steps.work import FORMULAS, OPS, POINTWISE, Work, moved
from s2kernels import backend, reference

LARGE = 2**16  # bytes; smaller tensors are computed, for the steps of an optimizer are among them
aten = torch.ops.aten


class DryRun(TorchDispatchMode):
    """Everything within is run dry; `phase` says what the operators are counted under.

    kernels   phase -> Counter of (FLOPs, bytes, name of the dtype of a product): one an operator
    peaks     phase -> the most bytes alive
    alive     bytes of the storages made within and still there
    """

    def __init__(self) -> None:
        super().__init__()
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry
        self._storages: dict[int, weakref.finalize] = {}
        self._within_op = False
        self.phase = "building"
        self.alive = 0
        self.forget()

    def forget(self) -> None:
        """What was counted so far; what is alive stays alive."""
        self.kernels: dict[str, Counter[tuple[int, int, str]]] = {}
        self.peaks: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        if _is_long(func, tensors):
            result = _hollow(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        results = list(_tensors(result))
        self._track(results)
        nbytes = 0 if self._within_op else moved(func, args, kwargs, tensors, results)
        if nbytes:
            formula = self._formulas.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self._book(flops, nbytes, tensors[0].dtype if tensors else torch.float32)
        return result

    def op(self, name: str, work: Callable[..., Work], run: Callable[..., Any]) -> Callable:
        """`run`, an op of `s2kernels.reference`, as one kernel that does what `work` says."""

        def booked(*args, **kwargs):
            outer, self._within_op = self._within_op, True
            try:
                found, result = work(*args, **kwargs), run(*args, **kwargs)
            finally:
                self._within_op = outer
            if not outer:
                flops = 0 if name in POINTWISE else found.flops
                self._book(flops, found.bytes, next(_tensors(args)).dtype)
            return result

        return booked

    def _book(self, flops: int, nbytes: int, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self.kernels.setdefault(self.phase, Counter())[flops, nbytes, name] += 1

    def _track(self, results: list[Tensor]) -> None:
        for storage in (part.untyped_storage() for x in results for part in dense_parts(x)):
            key, nbytes = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self.alive += nbytes
                self._storages[key] = weakref.finalize(storage, self._freed, key, nbytes)
        if not self._within_op:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.alive)

    def _freed(self, key: int, nbytes: int) -> None:
        self.alive -= nbytes
        del self._storages[key]


# Used instead of references that go through a weight in strips or look at positions.
_RESULTS: dict[str, Callable[..., Any]] = {
    "sparse_write": lambda weights, base, delta, index: None,
    "sparse_grad": lambda dy, x, index, plan=None, grad=None: (
        dy.new_empty(index.shape, dtype=torch.float32) if grad is None else grad
    ),
    "sm3_update": lambda row, col, index, grad: torch.empty_like(grad, dtype=row.dtype),
}


@contextmanager
def dry_run(device: str) -> Iterator[DryRun]:
    """A `DryRun` in which the ops of `s2kernels` are those of a GPU (each one kernel, joined
    weights), for device "cuda", or the plain torch of a CPU, for "cpu".
    """
    run = DryRun()
    if device == "cpu":
        with _untouched_memory(), run:
            yield run
        return
    ops = {
        name: run.op(name, work, _RESULTS.get(name) or getattr(reference, name))
        for name, work in OPS.items()
    }
    kernels = SimpleNamespace(**ops, tile_plan=reference.tile_plan)
    kernels.slice_writer = lambda *given: partial(kernels.slice_write, *given)
    # A product and what follows it are two kernels, as s2kernels.backend has them by default.
    kernels.linear_plus_slice = lambda x, weight, bias, part, delta: kernels.slice_linear_(
        kernels.linear(x, weight, bias), part, delta, None, "in"
    )
    kernels.linear_dx_plus_slice = lambda dy, weight, part, delta: kernels.slice_linear_(
        kernels.linear_dx(dy, weight), part, delta.t(), None, "in"
    )
    kernels.linear_dx_swiglu_bwd = lambda dy, weight, *others: kernels.swiglu_bwd(
        kernels.linear_dx(dy, weight), *others
    )
    with (
        _untouched_memory(),
        patch.object(backend, "select", lambda x, impl=None: kernels),
        patch.object(backend, "prefers_joined", lambda weight: True),
        run,
    ):
        yield run


@contextmanager
def _untouched_memory() -> Iterator[None]:
    """Deterministic algorithms fill what is empty, which would take the memory of a whole model."""
    settings: Any = torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled


def _is_large(x: Tensor) -> bool:
    is_plain = x.layout is torch.strided and x.is_floating_point()
    return is_plain and x.numel() * x.itemsize > LARGE


# They take no tensor, and what they make may be large.
_MADE_OF_NOTHING = {aten.eye, aten.full, aten.ones, aten.rand, aten.randn}


def _is_long(func, tensors: list[Tensor]) -> bool:
    """Whether an operator would take long: it meets a large tensor, or may make one of small ones.

    Everything else is computed: optimizers divide by a count of steps, for example.
    """
    if any(_is_large(x) for x in tensors) or func.overloadpacket in _MADE_OF_NOTHING:
        return True
    floats = [x.numel() for x in tensors if x.is_floating_point()]
    return 2 <= len(floats) <= 3 and 4 * math.prod(floats) > LARGE


# (operator, arguments with sizes for tensors) -> what it returns: the number of the argument, a
# tensor on the meta device, or anything else.
_known: dict[tuple, Any] = {}


def _hollow(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `func` returns, but for its numbers; what it would write to is returned as it is."""
    given = list(_tensors((args, kwargs)))
    if any(x.layout is not torch.strided for x in given):
        # Looking at the entries of a sparse tensor is quick. Adding it to a dense one is not.
        dense = next((x for x in given if x.layout is torch.strided), None)
        if dense is not None and func.overloadpacket is aten.add:
            return _empty(dense)
        return dense if func.overloadpacket is aten.add_ else func(*args, **kwargs)
    leaves, tree = tree_flatten(
        (args, kwargs | {"device": "meta"} if "device" in kwargs else kwargs)
    )
    key = (func, *map(_size, leaves), tree, torch.get_default_dtype())
    if key not in _known:
        shadows = {i: _shadow(x) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        on_meta = tree_unflatten([shadows.get(i, x) for i, x in enumerate(leaves)], tree)
        try:
            result = _LACKING.get(func.overloadpacket, func)(*on_meta[0], **on_meta[1])
        except NotImplementedError:
            return func(*args, **kwargs)
        places = {id(shadow): i for i, shadow in enumerate(shadows.values())}
        _known[key] = tree_map_only(Tensor, lambda x: places.get(id(x), x), result)
    known = _known[key]
    if any(x.layout is not torch.strided for x in _tensors(known)):
        return func(*args, **kwargs)
    return _made(known, given)


# Operators of which torch does not know the sizes of the results, and which take long.
_LACKING = {aten.geqrf: lambda a: (torch.empty_like(a), a.new_empty(min(a.shape[-2:])))}


def _made(known: Any, given: list[Tensor]) -> Any:
    if isinstance(known, Tensor):
        return _empty(known)
    if isinstance(known, list | tuple):
        return type(known)(_made(each, given) for each in known)
    return given[known] if type(known) is int else known


def _empty(like: Tensor) -> Tensor:
    """Zeros where they may be taken for positions: they cost nothing, the pages being empty."""
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
    return x if _is_large(x) else x.zero_()


def _shadow(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _size(x: Any) -> tuple:
    """All of an argument that the size of a result depends on, hashable."""
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)
