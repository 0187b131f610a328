"""SpIEL-AG's evidence: the gradients of entries that are not trained, while a window is open."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from s2kernels import backend
from s2kernels.peft.spiel.layer import SpIELLinear
from s2kernels.plan import TilePlan, largest, tile_plan

NUM_PROBES = 64


class GradientWindow:
    """What is seen of one layer while a window is open.

    candidates  the k entries of largest gradient in the first backward, or in the next one where
                all are 0 or some are not finite
    total       (k,) sum over steps of the gradients that the optimizer would get for them, which
                are summed over the micro-batches of a step; fp32 or fp64
    squares     (k,) sum over steps of their squares
    steps       how many steps these are
    agreed      whether the candidates are those of all processes, where there are several
    probes      some of the entries that are trained, at `probed` in the index: see `close_step`.
                They are spread, so that not all lie in outputs without a gradient
    """

    def __init__(self, layer: SpIELLinear, adapter: str) -> None:
        index = layer.spiel_index[adapter]
        self.layer, self.adapter, self.num = layer, adapter, len(index)
        self.agreed = False
        num_probes = min(NUM_PROBES, self.num)
        self.probed = torch.arange(num_probes, device=index.device) * self.num // num_probes
        self.probes = index[self.probed]
        self.candidates: Tensor | None = None
        self.total: Tensor | None = None
        self.squares: Tensor | None = None
        self.steps = 0
        # of the step that is running
        self.grad: Tensor | None = None
        self.probe_grad: Tensor | None = None
        self._plans: tuple[TilePlan, TilePlan] | None = None

    @property
    def delta(self) -> Tensor:
        """What is trained in the layer, (k,), with the gradient that the optimizer has got."""
        return self.layer.spiel_delta[self.adapter]

    def observe(self, dy: Tensor, x: Tensor) -> None:
        """Called in backward with dy (M, N) and x (M, K)."""
        ops = backend.select(dy)
        if self.candidates is None:
            candidates = ops.growth_candidates(dy, x, self.num)
            # NaN counts as the largest
            if not 0 < float(ops.sparse_grad(dy, x, candidates).abs().max()) < float("inf"):
                return
            self.candidates = candidates
        if self._plans is None:
            shape = self.layer.shape
            self._plans = tile_plan(self.candidates, shape), tile_plan(self.probes, shape)
        plan, probe_plan = self._plans
        self.grad = ops.sparse_grad(dy, x, self.candidates, plan, self.grad)
        self.probe_grad = ops.sparse_grad(dy, x, self.probes, probe_plan, self.probe_grad)

    def count(self, scale: Tensor | None) -> None:
        """Count the step that has ended, its gradients times scale, (); None leaves it out."""
        if self.grad is not None and scale is not None:
            grad = self.grad * scale.to(self.grad.device, self.grad.dtype)
            self.total = grad if self.total is None else self.total + grad
            squares = grad.square()
            self.squares = squares if self.squares is None else self.squares + squares
            self.steps += 1
        self.grad = self.probe_grad = None


def close_step(watches: Sequence[GradientWindow], group: dist.ProcessGroup | None) -> None:
    """Count the step that has ended in these layers.

    group: the processes of DDP, whose mean gradients are then counted; None for a single process.

    What lies between backward and optimizer (GradScaler, clipping) is not seen in backward. It
    scales all gradients alike: by the ratio of what the optimizer has got for the probes to what
    was seen of them. A step of gradients that are not finite is left out.

    Raises ValueError where the gradients are gone.
    """
    if group is not None:
        _average(watches, group)
    seen = torch.zeros((), dtype=torch.float64, device=watches[0].delta.device)
    got, finite = torch.zeros_like(seen), torch.ones_like(seen, dtype=torch.bool)
    for watch in watches:
        optimized = watch.delta.grad
        for grad in (watch.grad, optimized):
            if grad is not None:
                finite &= grad.isfinite().all().to(finite.device)
        if watch.probe_grad is None:
            continue
        if optimized is None:
            raise ValueError(
                "there is no gradient: tuner.step() goes after optimizer.step() and before "
                "zero_grad()"
            )
        seen += watch.probe_grad.abs().sum(dtype=torch.float64).to(seen.device)
        got += optimized[watch.probed].abs().sum(dtype=torch.float64).to(got.device)
    if bool(finite) and 0 < float(seen) < float("inf") and float(got) == 0:
        raise ValueError(
            "the gradients are all 0, and those of the backward were not: tuner.step() goes after "
            "optimizer.step() and before zero_grad()"
        )
    ratio = torch.ones_like(seen) if float(seen) == 0 else got / seen
    scale = ratio if bool(finite & ratio.isfinite()) else None
    for watch in watches:
        watch.count(scale)


def agree(watches: Sequence[GradientWindow], group: dist.ProcessGroup) -> None:
    """Give all processes of `group` the same candidates, after the first step that names any.

    Every process has named its own from what it has seen. Those of largest summed gradient are
    taken, a process that has not named one counting as 0. The step does not count: no process knows
    the gradients of what others have named.
    """
    for watch in watches:
        device = watch.delta.device
        positions = torch.full((watch.num,), -1, dtype=torch.int64, device=device)
        values = torch.zeros(watch.num, dtype=torch.float64, device=device)
        if watch.candidates is not None and watch.grad is not None:
            positions.copy_(watch.candidates)
            values.copy_(watch.grad)
        all_positions, all_values = _gathered(positions, group), _gathered(values, group)
        union = torch.cat(all_positions).unique()
        union = union[union >= 0]
        sums = values.new_zeros(len(union))
        # one process after the other: the same order of additions everywhere
        for theirs, grads in zip(all_positions, all_values, strict=True):
            if theirs[0] >= 0:
                sums[torch.searchsorted(union, theirs)] += grads
        _, agreed = largest(sums.abs(), union, watch.num)
        watch.agreed = len(agreed) > 0  # else no process has named any: the next step may
        watch.candidates = agreed.to(watch.probes.dtype) if watch.agreed else None
        watch.grad = watch.probe_grad = watch._plans = None


def _average(watches: Sequence[GradientWindow], group: dist.ProcessGroup) -> None:
    """Replace the gradients of the running step by their means over the processes."""
    parts = []
    for watch in watches:
        if watch.grad is None or watch.probe_grad is None:  # this process did not use the layer
            dtype = torch.promote_types(watch.delta.dtype, torch.float32)
            watch.grad = torch.zeros(watch.num, dtype=dtype, device=watch.delta.device)
            watch.probe_grad = watch.grad.new_zeros(len(watch.probes))
        parts += [watch.grad, watch.probe_grad]
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for part, mean in zip(parts, flat.split([len(part) for part in parts]), strict=True):
        part.copy_(mean)


def _gathered(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    found = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, values, group=group)
    return found
