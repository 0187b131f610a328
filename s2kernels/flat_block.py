"""Parameters of an optimizer in one buffer, with their gradients and moments.

    values, gradients, exp_avg, exp_avg_sq    | delta 0 | pad | delta 1 | pad | ...

Every parameter begins on a multiple of 128 bytes, since kernels read aligned addresses faster. The
padding is zero, has a zero gradient, and so AdamW leaves it zero.

Where gradients are used up by the moments in the backward, a buffer for them is made only if one
comes that is not: of a parameter with hooks, or that no kernel of ours computes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2kernels import backend
from s2kernels.autograd.accumulate import own_gradient
from s2kernels.moments import Moments

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
    used_up         the parameters whose gradient went into their moments since the last step
    """

    def __init__(
        self, params: list[Tensor], group: dict[str, Any], accumulate: bool, use_up: bool
    ) -> None:
        self.params = params
        self.group, self._use_up = group, use_up
        unit = ALIGNMENT_BYTES // params[0].element_size()
        self._starts = [0]
        for p in params:
            self._starts.append(self._starts[-1] + -(-p.numel() // unit) * unit)
        self.values, self.grads = self._zeros(self._starts[-1]), self._zeros(0)
        self.moments = [self._zeros(0) for _ in MOMENTS]
        self.steps: list[Tensor | None] = [None] * len(params)
        self.used_up: set[int] = set()

        views = self._views(self.values)
        torch._foreach_copy_(views, [p.detach() for p in params])
        for p, view in zip(params, views, strict=True):
            p.data = view
        self._addresses = [p.data_ptr() for p in params]
        self.slots: list[Tensor] = []
        self._slot_addresses: list[int] = []
        # slots that nothing was put into since all were zeroed
        self._is_clear = [False] * len(params)
        if not use_up:
            self._make_slots()
        self.collect_grads()
        if accumulate or use_up:
            self._index = {id(p): i for i, p in enumerate(params)}
            for p in params:
                own_gradient(p, self)

    def is_in_place(self) -> bool:
        """Whether values and slots are where they were put: `.to` moves both."""
        return [p.data_ptr() for p in self.params] == self._addresses and [
            slot.data_ptr() for slot in self.slots
        ] == self._slot_addresses

    def span(self, run: slice) -> slice:
        """Where the parameters of a run lie in the flat tensors."""
        return slice(self._starts[run.start], self._starts[run.stop])

    def foreign_grads(self) -> list[int]:
        """The parameters whose gradient is not in its slot."""
        slots: list[Tensor | None] = [*self.slots] or [None] * len(self.params)
        return [
            i
            for i, (p, slot) in enumerate(zip(self.params, slots, strict=True))
            if p.grad is not None and p.grad is not slot
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

    def take_slot(self, parameter: Tensor) -> Tensor | Moments | None:
        """See `s2kernels.autograd.accumulate.GradientOwner`."""
        i = self._index[id(parameter)]
        if self._use_up:
            return self._take_moments(i)
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

    def _take_moments(self, i: int) -> Moments | None:
        """Those of the parameter, once for each step; None for one that gets a gradient."""
        p = self.params[i]
        # experts, whose gradients are of one kernel for all; moved, and not yet laid out anew
        if p.grad is not None or p.dim() != 2 or p.data_ptr() != self._addresses[i]:
            return None
        if i in self.used_up:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} got a second gradient before "
                "optimizer.step(), and the first one is in its moments: moments_in_backward goes "
                "without accumulation over micro-batches, retain_graph and deltas used twice"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "moments_in_backward must not train on several processes, which would each use up "
                "a gradient of their own: make FlatAdamW without it"
            )
        if not self.moments[0].numel():
            self._make_moments()
        self.used_up.add(i)
        exp_avg, exp_avg_sq = (self._view(moment, i) for moment in self.moments)
        return Moments(exp_avg, exp_avg_sq, self.group["betas"])

    def step_used_up(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """The values of those whose gradient is in their moments.

        Raises RuntimeError for one that has another gradient beside.
        """
        for i in self.used_up:
            if self.params[i].grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(self.params[i].shape)} got a gradient beside the "
                    "one that is in its moments: moments_in_backward goes without terms of the "
                    "loss that read a delta itself"
                )
        ops = backend.select(self.values)
        for run in self.runs(states, sorted(self.used_up)):
            step, span = self.steps[run.start], self.span(run)
            assert step is not None
            step += 1
            moments = (moment[span] for moment in self.moments)
            coefficients = self._coefficients(step)
            ops.adamw_values_(self.values[span], *moments, coefficients, self.group["eps"])
            torch.autograd.graph.increment_version(self.params[run])
        self.used_up.clear()

    def _coefficients(self, step: Tensor) -> Tensor:
        """Those of `adamw_values_`, without waiting for the device."""
        (beta1, beta2), lr = self.group["betas"], self.group["lr"]
        t = step.double()
        lr = lr.double() if isinstance(lr, Tensor) else torch.full_like(t, lr)
        decay = 1 - lr * self.group["weight_decay"]
        exact = torch.stack((decay, lr / (1 - beta1**t), (1 - beta2**t).rsqrt()))
        return exact.to(self.values.dtype)

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
        return [i for i, p in enumerate(self.params) if p.grad is not None]

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
        moments = (self._view(moment, i) for moment in self.moments)
        states[self.params[i]] = {"step": step} | dict(zip(MOMENTS, moments, strict=True))

    def _make_moments(self) -> None:
        self.moments = [torch.zeros_like(self.values) for _ in MOMENTS]

    def _step(self, count: float) -> Tensor:
        return torch.full((), count, dtype=torch.float32, device=self.params[0].device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.params[0].dtype, device=self.params[0].device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [self._view(flat, i) for i in range(len(self.params))]

    def _view(self, flat: Tensor, i: int) -> Tensor:
        p = self.params[i]
        return flat[self._starts[i] : self._starts[i] + p.numel()].view(p.shape)

    def _make_slots(self) -> None:
        if not self.slots:
            self.grads = self._zeros(self._starts[-1])
            self.slots = self._views(self.grads)
            self._slot_addresses = [slot.data_ptr() for slot in self.slots]
