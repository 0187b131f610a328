"""Parameters of an optimizer in one buffer, with their gradients and moments.

    values, gradients, exp_avg, exp_avg_sq    | delta 0 | pad | delta 1 | pad | ...

Every parameter begins on a multiple of 128 bytes, since kernels read aligned addresses faster. The
padding is zero, has a zero gradient, and so AdamW leaves it zero.

Where gradients are used up in the backward, a buffer for them is made only if one comes that is
not: of a parameter with hooks, or that no kernel of ours computes.
"""

from typing import Any

import torch
from torch import Tensor

from s2kernels.autograd.accumulate import Use, own_gradient
from s2kernels.flat_update import BackwardSteps, UsedUp
from s2kernels.update import Update

ALIGNMENT_BYTES = 128
MOMENTS = ("exp_avg", "exp_avg_sq")


class Block:
    """Parameters of one dtype and device, one after the other in one buffer.

    group           of the optimizer, with its lr and betas
    values, grads   flat, the parameters' and their gradients; grads has no elements until needed
    moments         flat exp_avg and exp_avg_sq; of no elements until there is a state
    slots           for each parameter its view of `grads`, or none
    steps           for each parameter how often it was updated, fp32 (): the same tensor for those
                    that were always updated together; None for never
    backward_steps  those that are done in the backward, if steps_in_backward
    """

    def __init__(
        self, params: list[Tensor], group: dict[str, Any], accumulate: bool, steps_in_backward: bool
    ) -> None:
        self.params = params
        self.group, self.steps_in_backward = group, steps_in_backward
        self.backward_steps = BackwardSteps(len(params))
        unit = ALIGNMENT_BYTES // params[0].element_size()
        self._starts = [0]
        for p in params:
            self._starts.append(self._starts[-1] + -(-p.numel() // unit) * unit)
        self.values, self.grads = self._zeros(self._starts[-1]), self._zeros(0)
        self.moments = [self._zeros(0) for _ in MOMENTS]
        self.steps: list[Tensor | None] = [None] * len(params)

        views = self._views(self.values)
        torch._foreach_copy_(views, [p.detach() for p in params])
        for p, view in zip(params, views, strict=True):
            p.data = view
        self._addresses = [p.data_ptr() for p in params]
        self.slots: list[Tensor] = []
        self._slot_addresses: list[int] = []
        # slots that nothing was put into since all were zeroed
        self._is_clear = [False] * len(params)
        if not steps_in_backward:
            self._make_slots()
        self.collect_grads()
        if accumulate or steps_in_backward:
            self._index = {id(p): i for i, p in enumerate(params)}
            for p in params:
                own_gradient(p, self)

    def is_in_place(self) -> bool:
        """Whether values and slots are where they were put: `.to` moves both."""
        return [p.data_ptr() for p in self.params] == self._addresses and [
            slot.data_ptr() for slot in self.slots
        ] == self._slot_addresses

    def is_at_home(self, i: int) -> bool:
        """`is_in_place`, of the values of one parameter."""
        return self.params[i].data_ptr() == self._addresses[i]

    def span(self, run: slice) -> slice:
        """Where the parameters of a run lie in the flat tensors."""
        return slice(self._starts[run.start], self._starts[run.stop])

    def foreign_grads(self) -> list[int]:
        """The parameters whose gradient is not in its slot."""
        slots: list[Tensor | None] = [*self.slots] or [None] * len(self.params)
        return [
            i
            for i, (p, slot) in enumerate(zip(self.params, slots, strict=True))
            if p.grad is not None and p.grad is not slot and not isinstance(p.grad, UsedUp)
        ]

    def collect_grads(self) -> None:
        """Every gradient that there is, into its slot."""
        if not (foreign := self.foreign_grads()):
            return
        self._make_slots()
        slots = [self.slots[i] for i in foreign]
        given: list[Any] = [self.params[i].grad for i in foreign]
        if any(grad.is_sparse for grad in given):
            raise RuntimeError("FlatAdamW does not support sparse gradients")
        torch._foreach_copy_(slots, [grad.detach() for grad in given])
        for i in foreign:
            self.params[i].grad = self.slots[i]
            self._is_clear[i] = False

    def begin_use(self, parameter: Tensor) -> Use | None:
        """See `s2kernels.autograd.accumulate.GradientOwner`."""
        return self.backward_steps.begin_use(self._index[id(parameter)])

    def take_slot(self, parameter: Tensor, use: Use | None) -> Tensor | Update | None:
        """See `s2kernels.autograd.accumulate.GradientOwner`."""
        i = self._index[id(parameter)]
        if self.steps_in_backward:
            return self.backward_steps.take(self, i, use)
        slot = self.slots[i]
        if parameter.grad is None:
            if not self.is_at_home(i):
                return None  # moved, and not yet laid out anew
            # Not in zero_grad(), since model.zero_grad() drops gradients, too. Anew in each
            # backward that finds none, lest a CUDA graph of it counts on what was zero before.
            last = self.params[-1]  # which comes first, as a rule
            if last.grad is None and all(p.grad is None for p in self.params):
                self.grads.zero_()
                self._is_clear = [True] * len(self.params)
            elif not self._is_clear[i]:
                slot.zero_()
            parameter.grad = slot
            self._is_clear[i] = False
        return slot if parameter.grad is slot else None

    def moments_of(self, i: int) -> list[Tensor]:
        """Its exp_avg and exp_avg_sq, as views."""
        if not self.moments[0].numel():
            self._make_moments()
        return [self.view(moment, i) for moment in self.moments]

    def take_states(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Makes the moments in `states` views of `moments`, and has parameters of one step count
        share it. It waits for the device.
        """
        known = [i for i, p in enumerate(self.params) if states.get(p)]
        self.moments = [self._zeros(0) for _ in MOMENTS]
        self.steps = [None] * len(self.params)
        if not known:
            return
        counts = torch.stack([states[self.params[i]]["step"].float() for i in known]).tolist()
        shared = {count: self._step(count) for count in set(counts)}
        given = {i: states[self.params[i]] for i in known}
        self._make_moments()
        for i, count in zip(known, counts, strict=True):
            self._set_state(states, i, shared[count])
        for name in MOMENTS:
            views = [states[self.params[i]][name] for i in known]
            torch._foreach_copy_(views, [given[i][name] for i in known])

    def with_grads(self) -> list[int]:
        """The parameters with a gradient in memory."""
        grads = [p.grad for p in self.params]
        return [i for i, g in enumerate(grads) if g is not None and not isinstance(g, UsedUp)]

    def runs(self, states: dict[Tensor, dict[str, Any]], chosen: list[int]) -> list[slice]:
        """The parameters at these ascending places, as runs of neighbours that share a step count,
        each of which nobody else has: one run, as a rule.
        """
        runs: list[slice] = []
        for i in chosen:
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
        states[self.params[i]] = {"step": step} | dict(
            zip(MOMENTS, self.moments_of(i), strict=True)
        )

    def _make_moments(self) -> None:
        self.moments = [torch.zeros_like(self.values) for _ in MOMENTS]

    def _step(self, count: float) -> Tensor:
        return torch.full((), count, dtype=torch.float32, device=self.params[0].device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.params[0].dtype, device=self.params[0].device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [self.view(flat, i) for i in range(len(self.params))]

    def view(self, flat: Tensor, i: int) -> Tensor:
        """The part of a flat tensor that belongs to a parameter, in its shape."""
        p = self.params[i]
        return flat[self._starts[i] : self._starts[i] + p.numel()].view(p.shape)

    def _make_slots(self) -> None:
        if not self.slots:
            self.grads = self._zeros(self._starts[-1])
            self.slots = self._views(self.grads)
            self._slot_addresses = [slot.data_ptr() for slot in self.slots]
