"""AdamW over trained parameters that lie in one buffer: one launch a step, however many there are.

Each parameter stays what it is, but its values become a view of the buffer of its group, and so
do its gradient and its moments:

    values, gradients, exp_avg, exp_avg_sq    | delta 0 | pad | delta 1 | pad | ...

Every parameter begins on a multiple of 128 bytes, since kernels read aligned addresses faster. The
padding is zero, has a zero gradient, and so AdamW leaves it zero.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from s2kernels.autograd.accumulate import own_gradient
from s2kernels.coupling import not_plain

_ALIGNMENT_BYTES = 128
_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, bit for bit, with parameters of a group in one buffer.

    On a CPU alone, the last numbers of a parameter that is no whole number of vectors (64 bytes)
    can differ in their last bit: torch computes what is left over by other instructions.

    params:        as any optimizer of torch takes them, groups of their own lr and weight_decay
                   included: each group is one buffer for each dtype and device in it. Those that
                   need no gradient may be among them and are left where they are.
    capturable:    as in torch: for a step that is captured in a CUDA graph
    accumulate_in_backward:
                   gradients of deltas are added into the buffer by the kernel that computes them:
                   no d_delta in memory, no addition by autograd. Hooks on a delta,
                   `torch.autograd.grad`, `backward(inputs=...)` and torch.compile are noticed, and
                   get an ordinary gradient; create_graph=True is not: d_delta has no graph.
                   Under DistributedDataParallel gradients are reduced as ever. With its
                   gradient_as_bucket_view they lie in its buckets, and are copied from there.

    The states, `state_dict` and `load_state_dict` are those of torch.optim.AdamW, parameter by
    parameter: the one loads what the other saved. A parameter without a gradient is skipped, as
    torch does it; it then has a step count of its own, and the parameters before and behind it
    become separate tensors of the one launch.

    zero_grad() drops gradients, as in torch. What autograd then puts into .grad is a tensor of
    its own, which the step copies into the buffer, all in one `torch._foreach_copy_`. So while a
    backward runs there are 4 bytes more for each fp32 parameter than in torch; not with
    accumulate_in_backward, where the first delta of a backward zeroes the buffer by one memset,
    nor with zero_grad(set_to_none=False), where autograd adds to the views. A gradient that
    was kept over zero_grad() is a view of the buffer, too, and is overwritten.

    Where parameters have moved (`.to`, `load_state_dict(assign=True)`, deepcopy, another optimizer
    of this kind), they are laid out anew at the next step or zero_grad, with their states.

    Raises ValueError for parameters that are not plain floating tensors, such as those sharded by
    FSDP or on the meta device, or that share memory, before any of the group is moved, and
    RuntimeError for a move that comes to light while a CUDA graph is captured.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        capturable: bool = False,
        accumulate_in_backward: bool = False,
    ) -> None:
        self.accumulate_in_backward = accumulate_in_backward
        self._blocks: list[list[_Block]] = []  # of each group
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, capturable=capturable)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._up_to_date(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        blocks = [block for i in range(len(self.param_groups)) for block in self._up_to_date(i)]
        if not set_to_none and not any(block.foreign_grads() for block in blocks):
            for block in blocks:
                block.grads.zero_()
            return
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Parameters that share a step count here have one each."""
        saved = super().state_dict()
        for key, state in saved["state"].items():
            saved["state"][key] = state | {"step": state["step"].clone()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what this or torch's AdamW saved over the same parameters, as a copy.

        Raises ValueError, before anything is loaded, for the options amsgrad and maximize, and for
        states of other shapes.
        """
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in state_dict["param_groups"]):
                raise ValueError(f"FlatAdamW has no {option}, got a group with {option}=True")
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, params, strict=False):  # torch compares their numbers
            state = state_dict["state"].get(key)
            if not state:
                continue
            shapes = {n: tuple(state[n].shape) if n in state else None for n in _MOMENTS}
            if set(shapes.values()) != {tuple(p.shape)}:
                raise ValueError(
                    f"the state of a parameter of shape {tuple(p.shape)} must have {_MOMENTS} of "
                    f"that shape, got {shapes}"
                )
        super().load_state_dict(state_dict)
        for index, group in enumerate(self.param_groups):
            group.update(fused=True, foreach=None)
            for block in self._up_to_date(index):
                block.take_states(self.state)

    def _init_group(self, group, values, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps):  # type: ignore[override]
        """What torch's step asks for: the tensors of a group that it is to work on."""
        index = next(i for i, each in enumerate(self.param_groups) if each is group)
        for block in self._up_to_date(index):
            block.collect_grads()
            for run in block.runs(self.state):
                # The parameters do not see that their buffer is written: a backward that still
                # needs what they were is to notice it.
                torch.autograd.graph.increment_version(block.params[run])
                span = block.span(run)
                values.append(block.values[span])
                grads.append(block.grads[span])
                exp_avgs.append(block.moments[0][span])
                exp_avg_sqs.append(block.moments[1][span])
                steps.append(block.steps[run.start])
        return False  # nothing complex

    def _up_to_date(self, index: int) -> list["_Block"]:
        """The blocks of a group, laid out anew if a parameter has moved or come to need one."""
        params = self.param_groups[index]["params"]
        while len(self._blocks) <= index:
            self._blocks.append([])
        blocks = self._blocks[index]
        held = {p for block in blocks for p in block.params}
        wanted = [p for p in params if p.requires_grad or p.grad is not None or p in held]
        if len(wanted) == len(held) and all(block.is_in_place() for block in blocks):
            return blocks
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "parameters of FlatAdamW have moved since its last step, which a CUDA graph cannot "
                "follow: call zero_grad() or step() once before it is captured"
            )
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in wanted:
            if reason := not_plain(p):
                raise ValueError(
                    "params must be plain floating parameters to lie in one buffer, got one of "
                    f"shape {tuple(p.shape)}: {reason}"
                )
            alike.setdefault((p.dtype, p.device), []).append(p)
        addresses = [p.data_ptr() for p in wanted if p.numel()]
        if len(set(addresses)) < len(addresses):
            raise ValueError("params must have memory of their own, got two that share theirs")
        blocks = [_Block(group, self.accumulate_in_backward) for group in alike.values()]
        for block in blocks:
            block.take_states(self.state)
        self._blocks[index] = blocks
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"accumulate_in_backward": self.accumulate_in_backward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_blocks" not in self.__dict__:  # a copy, whose parameters are copies, too
            self._blocks = []
        super().__setstate__(state)


class _Block:
    """Parameters of one dtype and device, one after the other in one buffer.

    values, grads   flat, the parameters' and their gradients
    moments         flat exp_avg and exp_avg_sq; of no elements until there is a state
    slots           for each parameter its view of `grads`
    steps           for each parameter how often it was updated, fp32 (): the same tensor for those
                    that were always updated together; None for never
    """

    def __init__(self, params: list[Tensor], accumulate: bool) -> None:
        self.params = params
        unit = _ALIGNMENT_BYTES // params[0].element_size()
        self._starts = [0]
        for p in params:
            self._starts.append(self._starts[-1] + -(-p.numel() // unit) * unit)
        self.values, self.grads = (self._zeros(self._starts[-1]) for _ in range(2))
        self.moments = [self._zeros(0) for _ in _MOMENTS]
        self.steps: list[Tensor | None] = [None] * len(params)

        views = self._views(self.values)
        torch._foreach_copy_(views, [p.detach() for p in params])
        for p, view in zip(params, views, strict=True):
            p.data = view
        self.slots = self._views(self.grads)
        self._addresses = [(p.data_ptr(), slot.data_ptr()) for p, slot in self._pairs()]
        # slots that nothing was put into since all were zeroed
        self._is_clear = [False] * len(params)
        self.collect_grads()
        if accumulate:
            self._index = {id(p): i for i, p in enumerate(params)}
            for p in params:
                own_gradient(p, self)

    def is_in_place(self) -> bool:
        """Whether values and slots are where they were put: `.to` moves both."""
        return all(
            (p.data_ptr(), slot.data_ptr()) == addresses
            for (p, slot), addresses in zip(self._pairs(), self._addresses, strict=True)
        )

    def span(self, run: slice) -> slice:
        """Where the parameters of a run lie in the flat tensors."""
        return slice(self._starts[run.start], self._starts[run.stop])

    def foreign_grads(self) -> list[int]:
        """The parameters whose gradient is not in its slot."""
        return [
            i
            for i, (p, slot) in enumerate(self._pairs())
            if p.grad is not None and p.grad is not slot
        ]

    def collect_grads(self) -> None:
        """Every gradient that there is, into its slot."""
        if not (foreign := self.foreign_grads()):
            return
        slots = [self.slots[i] for i in foreign]
        given: list[Any] = [self.params[i].grad for i in foreign]
        if any(grad.is_sparse for grad in given):
            raise RuntimeError("FlatAdamW does not support sparse gradients")
        torch._foreach_copy_(slots, [grad.detach() for grad in given])
        for i in foreign:
            self.params[i].grad = self.slots[i]
            self._is_clear[i] = False

    def take_slot(self, parameter: Tensor) -> Tensor | None:
        """See `s2kernels.autograd.accumulate.GradientOwner`."""
        i = self._index[id(parameter)]
        slot = self.slots[i]
        if parameter.grad is None:
            if (slot.dtype, slot.device) != (parameter.dtype, parameter.device):
                return None  # moved, and not yet laid out anew
            # Not in zero_grad(), since model.zero_grad() drops gradients, too. Anew in each
            # backward that finds none, lest a CUDA graph of it counts on what was zero before.
            if all(p.grad is None for p in reversed(self.params)):  # the last comes first
                self.grads.zero_()
                self._is_clear = [True] * len(self.params)
            elif not self._is_clear[i]:
                slot.zero_()
            parameter.grad = slot
            self._is_clear[i] = False
        return slot if parameter.grad is slot else None

    def take_states(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Makes the moments in `states` views of `moments`, and has parameters of one step count
        share it. It waits for the device.
        """
        known = [i for i, p in enumerate(self.params) if states.get(p)]
        self.moments = [self._zeros(0) for _ in _MOMENTS]
        self.steps = [None] * len(self.params)
        if not known:
            return
        counts = torch.stack([states[self.params[i]]["step"].float() for i in known]).tolist()
        shared = {count: self._step(count) for count in set(counts)}
        given = {i: states[self.params[i]] for i in known}
        self._make_moments()
        for i, count in zip(known, counts, strict=True):
            self._set_state(states, i, shared[count])
        for name in _MOMENTS:
            views = [states[self.params[i]][name] for i in known]
            torch._foreach_copy_(views, [given[i][name] for i in known])

    def runs(self, states: dict[Tensor, dict[str, Any]]) -> list[slice]:
        """The parameters with a gradient, as runs of neighbours that share a step count, each of
        which nobody else has: one run, as a rule.
        """
        runs: list[slice] = []
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            if runs and runs[-1].stop == i and self.steps[i] is self.steps[i - 1]:
                runs[-1] = slice(runs[-1].start, i + 1)
            else:
                runs.append(slice(i, i + 1))
        if runs and not self.moments[0].numel():
            self._make_moments()
        for run in runs:
            step = self.steps[run.start]
            if step is None:
                step = self._step(0.0)
            elif sum(each is step for each in self.steps) > run.stop - run.start:
                step = step.clone()
            else:
                continue
            for i in range(run.start, run.stop):
                self._set_state(states, i, step)
        return runs

    def _set_state(self, states: dict[Tensor, dict[str, Any]], i: int, step: Tensor) -> None:
        self.steps[i] = step
        moments = (self._view(moment, i) for moment in self.moments)
        states[self.params[i]] = {"step": step} | dict(zip(_MOMENTS, moments, strict=True))

    def _make_moments(self) -> None:
        self.moments = [torch.zeros_like(self.values) for _ in _MOMENTS]

    def _step(self, count: float) -> Tensor:
        return torch.full((), count, dtype=torch.float32, device=self.params[0].device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.params[0].dtype, device=self.params[0].device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [self._view(flat, i) for i in range(len(self.params))]

    def _view(self, flat: Tensor, i: int) -> Tensor:
        p = self.params[i]
        return flat[self._starts[i] : self._starts[i] + p.numel()].view(p.shape)

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.params, self.slots, strict=True)
