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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.memory import follow, tensors_in
from bench.steps.work import FORMULAS, OPS, POINTWISE, moved
from s2kernels import backend, reference

LARGE = 2**16  # bytes; smaller tensors are computed, for the steps of an optimizer are among them
aten = torch.ops.aten


class DryRun(TorchDispatchMode):
    """Everything within is run dry; `phase` says what the operators are counted under.

    kernels   phase -> Counter of (FLOPs, bytes, name of the dtype of a product): one an operator
    peaks     phase -> the most bytes alive
    """

    def __init__(self) -> None:
        super().__init__()
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry
        self._storages: dict[int, int] = {}
        self._within_op = False
        self.phase = "building"
        self.forget()

    @property
    def alive(self) -> int:
        """Bytes of the storages made within and still there."""
        return sum(self._storages.values())

    def forget(self) -> None:
        """What was counted so far; what is alive stays alive."""
        self.kernels: defaultdict[str, Counter[tuple[int, int, str]]] = defaultdict(Counter)
        self.peaks: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if _is_long(func, tensors):
            result = _hollow(func, args, kwargs, tensors)
        else:
            result = func(*args, **kwargs)
        results = list(tensors_in(result))
        follow(results, self._storages)
        if self._within_op:
            return result
        self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
        if nbytes := moved(func, args, kwargs, tensors, results):
            formula = self._formulas.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self._book(flops, nbytes, tensors[0].dtype if tensors else torch.float32)
        return result

    def op(self, name: str) -> Callable[..., Any]:
        """The op of `s2kernels.reference` as one kernel, which does what `work.OPS` says."""
        work, run = OPS[name], _RUNS.get(name) or getattr(reference, name)

        def booked(*args, **kwargs):
            outer, self._within_op = self._within_op, True
            try:
                found, result = work(*args, **kwargs), run(*args, **kwargs)
            finally:
                self._within_op = outer
            if not outer:
                flops = 0 if name in POINTWISE else found.flops
                self._book(flops, found.bytes, next(tensors_in(args)).dtype)
            return result

        return booked

    def _book(self, flops: int, nbytes: int, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self.kernels[self.phase][flops, nbytes, name] += 1


def _sparse_grad(dy: Tensor, x: Tensor, index: Tensor, plan=None, grad=None) -> Tensor:
    """The op's result. The reference goes through a weight in many strips, which takes seconds."""
    return dy.new_empty(index.shape, dtype=torch.float32) if grad is None else grad


_slice_writer = reference.slice_writer  # which calls slice_write while it is counted
_RUNS = {"sparse_grad": _sparse_grad, "slice_write": lambda *given: _slice_writer(*given)()}


@contextmanager
def dry_run(device: str) -> Iterator[DryRun]:
    """A `DryRun` with the kernels of a GPU, for device "cuda", or plain torch, for "cpu".

    On a GPU each op of `s2kernels` is one kernel, and weights are joined.
    """
    run = DryRun()
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(patch.multiple(reference, **_kernels(run)))
            stack.enter_context(patch.object(backend, "prefers_joined", lambda weight: True))
        yield stack.enter_context(run)


def _kernels(run: DryRun) -> dict[str, Callable[..., Any]]:
    """What stands in the place of the ops of `s2kernels.reference`, by their names."""
    ops = {name: run.op(name) for name in OPS}
    # A product and what follows it are two kernels, as s2kernels.backend has them by default. Two
    # of the reference's own call two ops. The third calls torch's addmm_ for the second of them.
    del ops["linear_plus_slice"], ops["linear_dx_swiglu_bwd"]
    ops["slice_writer"] = partial(partial, ops["slice_write"])
    ops["linear_dx_plus_slice"] = lambda dy, weight, part, delta: ops["slice_linear_"](
        ops["linear_dx"](dy, weight), part, delta.t(), None, "in"
    )
    return ops


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


# Operator, default dtype and sizes of arguments -> results; a text is the number of an argument.
_known: dict[tuple, Any] = {}


def _hollow(func, args: tuple, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """What `func` returns, but for its numbers; what it would write to is returned as it is."""
    if any(x.layout is not torch.strided for x in given):
        # Looking at the entries of a sparse tensor is quick. Adding it to a dense one is not.
        dense = next((x for x in given if x.layout is torch.strided), None)
        if dense is not None and func.overloadpacket is aten.add:
            return _empty(dense)
        return dense if func.overloadpacket is aten.add_ else func(*args, **kwargs)
    sizes = tree_map_only(Tensor, lambda x: (x.shape, x.stride(), x.dtype), (args, kwargs))
    key = func, torch.get_default_dtype(), str(sizes)
    if key not in _known:
        on_meta = tree_map_only(Tensor, partial(_empty, device="meta"), (args, kwargs))
        if "device" in kwargs:
            on_meta[1]["device"] = "meta"
        try:
            result = _LACKING.get(func.overloadpacket, func)(*on_meta[0], **on_meta[1])
        except NotImplementedError:
            return func(*args, **kwargs)
        numbers = {id(meta): str(number) for number, meta in enumerate(tensors_in(on_meta))}
        _known[key] = tree_map_only(Tensor, lambda x: numbers.get(id(x), x), result)
    if any(x.layout is not torch.strided for x in tensors_in(_known[key])):
        return func(*args, **kwargs)
    made = tree_map_only(Tensor, _empty, _known[key])
    return tree_map_only(str, lambda number: given[int(number)], made)


# Operators of which torch does not know the sizes of the results, and which take long.
_LACKING = {aten.geqrf: lambda a: (torch.empty_like(a), a.new_empty(min(a.shape[-2:])))}


def _empty(like: Tensor, device: str = "cpu") -> Tensor:
    """Zeros where they may be taken for positions: they cost nothing, the pages being empty."""
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return x if _is_large(x) else x.zero_()
