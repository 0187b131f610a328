"""Steps that are done in the backward, one parameter after the other; the optimizer's counts them.

A parameter is stepped by the gradient that one backward computes. So there must be one forward
that reads it, one backward, and nobody who wants to see the gradient. Of anything else, what can be
noticed is refused before the parameter changes; and whoever looks at its gradient afterwards is
told that it was used up (`UsedUp`).
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2kernels.autograd.accumulate import Use
from s2kernels.update import Update


class BackwardSteps:
    """Those of the parameters of one block, which are known by their places in it.

    It holds nothing of the block, a `s2kernels.flat_block.Block`, which must go when its optimizer
    does.

    done   the parameters that were stepped since the last optimizer.step()
    """

    def __init__(self, num_parameters: int) -> None:
        self.done: set[int] = set()
        self._uses: list[list[weakref.ref[Use]]] = [[] for _ in range(num_parameters)]
        # by the identity of a step count, which parameters share: it, and what follows from it
        self._coefficients: dict[int, tuple[Tensor | None, Tensor]] = {}

    def begin_use(self, i: int) -> Use:
        """See `s2kernels.autograd.accumulate.GradientOwner`."""
        if i in self.done and torch._C._current_graph_task_id() != -1:  # type: ignore[attr-defined]
            raise RuntimeError(
                "a layer is computed again inside of the backward that has stepped it: with "
                "step_in_backward a checkpoint must not hold a layer that is used elsewhere, too"
            )
        use = Use()
        self._uses[i] = [each for each in self._uses[i] if each() is not None]
        self._uses[i].append(weakref.ref(use))
        return use

    def take(self, block: Any, i: int, use: Use | None) -> Update | None:
        """The step of a parameter, which is done from then on; None for one that gets a gradient.

        Raises RuntimeError, and nothing has changed, where the gradient is not all of it.
        """
        p = block.params[i]
        if i in self.done:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} got a second gradient before "
                "optimizer.step(), and was stepped by the first one: step_in_backward goes without "
                "accumulation over micro-batches; after a backward that failed call "
                "optimizer.step(), which counts what was stepped"
            )
        # experts, whose gradients are of one kernel for all; moved, and not yet laid out anew
        if p.grad is not None or p.dim() != 2 or not block.is_at_home(i):
            return None
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            raise RuntimeError(
                "step_in_backward goes without retain_graph and create_graph: another backward of "
                "the graph would read parameters that were stepped"
            )
        alive = [each for ref in self._uses[i] if (each := ref()) is not None]
        if len(alive) != 1 or alive[0] is not use:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was read by {len(alive)} forwards whose "
                "graphs are alive, and step_in_backward wants one: use each delta once, run "
                "forwards without a backward under torch.no_grad(), or drop what they returned"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "step_in_backward must not train on several processes, each of which would step by "
                "a gradient of its own: make FlatAdamW without it"
            )
        exp_avg, exp_avg_sq = block.moments_of(i)
        coefficients = self._coefficients_of(block, i)
        self._uses[i].clear()
        self.done.add(i)
        p.grad = UsedUp.like(p)
        values, group = block.view(block.values, i), block.group
        return Update(values, exp_avg, exp_avg_sq, coefficients, group["betas"], group["eps"])

    def count(self, block: Any, states: dict[Tensor, dict[str, Any]]) -> None:
        """Optimizer.step() of those that are done.

        Raises RuntimeError for one that was given another gradient since.
        """
        for i in self.done:
            if (grad := block.params[i].grad) is not None and not isinstance(grad, UsedUp):
                raise RuntimeError(
                    f"a parameter of shape {tuple(block.params[i].shape)} was stepped in the "
                    "backward, and has got another gradient since: call optimizer.step() before"
                )
        for run in block.runs(states, sorted(self.done)):
            step = block.steps[run.start]
            assert step is not None
            step += 1
        self.forget(block)

    def forget(self, block: Any) -> None:
        """Take it that none was stepped since the last optimizer.step()."""
        for i in self.done:
            if isinstance(block.params[i].grad, UsedUp):
                block.params[i].grad = None
        self.done.clear()
        self._coefficients.clear()

    def _coefficients_of(self, block: Any, i: int) -> Tensor:
        """Those of `Update`, without waiting for the device, and once for each step count."""
        step, group = block.steps[i], block.group
        if id(step) not in self._coefficients:
            (beta1, beta2), lr = group["betas"], group["lr"]
            t = block.values.new_ones((), dtype=torch.float64)
            if step is not None:
                t = step.double() + 1
            lr = lr.double() if isinstance(lr, Tensor) else torch.full_like(t, lr)
            decay = 1 - lr * group["weight_decay"]
            exact = torch.stack((decay, lr / (1 - beta1**t), (1 - beta2**t).rsqrt()))
            self._coefficients[id(step)] = step, exact.to(block.values.dtype)
        return self._coefficients[id(step)][1]


class UsedUp(Tensor):
    """The .grad of a parameter between the backward that has stepped it and optimizer.step().

    It has a shape, a dtype and a device, and no memory. To compute with it raises RuntimeError. But
    trainers log the norm of all gradients, and for that clip to an infinite one. So it has a norm,
    which stands for one that is not known, and may be multiplied by what that makes of it, 1.
    """

    NORM = 1e12

    @staticmethod
    def like(tensor: Tensor, **changed: Any) -> "UsedUp":
        kind = {name: changed.get(name) or getattr(tensor, name) for name in ("dtype", "device")}
        return Tensor._make_wrapper_subclass(UsedUp, tensor.shape, **kind)  # type: ignore

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"UsedUp(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        # a model may be moved, with what its parameters have for gradients
        if func in (aten.detach.default, aten._to_copy.default):
            return cls.like(args[0], **(kwargs or {}))
        if func is aten.linalg_vector_norm.default:
            return torch.full((), cls.NORM, dtype=args[0].dtype, device=args[0].device)
        if func is aten._foreach_norm.Scalar:
            return [torch.linalg.vector_norm(grad, *args[1:]) for grad in args[0]]
        if func in (aten.mul_.Tensor, aten._foreach_mul_.Tensor) and not args[1] < 1:
            return args[0]
        raise RuntimeError(
            "this gradient was used up in the backward: FlatAdamW(step_in_backward=True) goes "
            "without what needs it, such as clipping (max_grad_norm=0 in transformers), a "
            "GradScaler, accumulation, and terms of the loss that read a delta themselves"
        )
