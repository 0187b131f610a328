"""Optimizers for trained entries that change while training goes on (SpIEL).

AgedAdamW   AdamW with a step count of its own for every entry
SM3         one number per row and one per column of the weight, instead of one per entry

Both keep their states in fp32 (fp64 for fp64 parameters) whatever the parameter's dtype: ages in
bf16 would stop at 256. Both train other parameters along with the deltas (modules_to_save).
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from s2kernels import backend

# Of a parameter that is the delta of a weight (N, K): its shape and the present index (k,).
Support = tuple[tuple[int, int], Tensor]


def _no_support(p: Tensor) -> Support | None:
    """What `SM3` takes for the support of a parameter that is no delta."""
    return None


class AgedAdamW(Optimizer):
    """AdamW whose bias correction goes by the age of each entry: the steps since it was grown.

        age += 1    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g²
        p = (1 - lr * weight_decay) p - lr * m / (1 - b1^age) / (sqrt(v / (1 - b2^age)) + eps)

    While no entry changes, this is `torch.optim.AdamW`. weight_decay pulls the parameter, that is
    the delta and not the weight, to 0. States: exp_avg, exp_avg_sq, age, shaped like the parameter.

    Raises ValueError for a negative lr, eps or weight_decay, and betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            beta1, beta2 = group["betas"]
            states = [self._state_of(p) for p in params]
            means, squares, ages = (
                [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "age")
            )
            grads = [p.grad.to(mean.dtype) for p, mean in zip(params, means, strict=True)]

            torch._foreach_add_(ages, 1)
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
            roots = torch._foreach_div(squares, _one_minus_power(beta2, ages))
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_mul_(roots, _one_minus_power(beta1, ages))
            update = torch._foreach_div(means, roots)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            for name in ("exp_avg", "exp_avg_sq", "age"):
                state[name] = torch.zeros_like(p, dtype=_state_dtype(p))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _keep_dtypes(self, state_dict)


class SM3(Optimizer):
    """SM3 (arXiv 1901.11150) without momentum: the memory-efficient optimizer of SpIEL-MA.

    For the entry e of a delta, in row i and column j of its weight (N, K):

        nu = min(row[i], col[j]) + g²    delta -= lr * g / sqrt(nu + eps)

    after which row[i] and col[j] are raised to the largest nu of their entries. So the state of a
    delta is row (N,) and col (K,), of the whole weight: it stays where it is when entries are
    replaced, and row[i] * col[j] estimates what entries that are not trained would be worth.

    supports: which parameters are deltas of what weight; `s2kernels.peft.support_of(model)` gives
    it, and copies of the optimizer keep it. Any other parameter has one statistic per index of each
    of its axes, and the least of them counts. weight_decay pulls the parameter, that is the delta,
    to 0, as in AdamW.

    Raises ValueError for a negative lr, eps or weight_decay, and in a step for a sharded delta.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        supports: Callable[[Tensor], Support | None] = _no_support,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        self.supports = supports
        super().__init__(params, dict(lr=lr, eps=eps, weight_decay=weight_decay))

    def __getstate__(self) -> dict[str, Any]:
        # torch's has what every optimizer has
        return super().__getstate__() | {"supports": self.supports}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.to(_state_dtype(p))
                support = self.supports(p)
                if support is None:
                    nu = _dense_update(self.state[p], grad)
                else:
                    if isinstance(p, DTensor):
                        raise ValueError(
                            "SM3 cannot train the delta of a model that FSDP2 has sharded: its "
                            "statistics are of whole rows and columns; use AgedAdamW or AdamW"
                        )
                    shape, index = support
                    state = self.state[p]
                    if not state:
                        state["row"], state["col"] = (grad.new_zeros(size) for size in shape)
                    ops = backend.select(p)
                    nu = ops.sm3_update(state["row"], state["col"], index, grad)
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * grad * torch.rsqrt(nu + group["eps"]))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _keep_dtypes(self, state_dict)


def _dense_update(state: dict[str, Tensor], grad: Tensor) -> Tensor:
    """SM3's statistics of a parameter of any shape: one along each axis. Returns nu."""
    square = grad.square().view(grad.shape or (1,))
    if not state:
        for axis, size in enumerate(square.shape):
            sizes = [1] * square.dim()
            sizes[axis] = size
            state[f"axis_{axis}"] = square.new_zeros(sizes)
    statistics = list(state.values())
    nu = statistics[0] + torch.zeros_like(square)
    for statistic in statistics[1:]:
        nu = torch.minimum(nu, statistic)
    nu += square
    for axis, statistic in enumerate(statistics):
        others = [i for i in range(nu.dim()) if i != axis]
        largest = nu.amax(others, keepdim=True) if others else nu
        statistic.copy_(torch.maximum(statistic, largest))
    return nu.view(grad.shape)


def _one_minus_power(beta: float, ages: list[Tensor]) -> list[Tensor]:
    """1 - beta^age."""
    powers = list(torch._foreach_pow(beta, ages))
    torch._foreach_neg_(powers)
    torch._foreach_add_(powers, 1)
    return powers


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Takes the states as they were saved: torch casts all but "step" to the parameter's dtype."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.to(p.device, _state_dtype(p), copy=True)


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
