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
from torch.distributed.tensor import DTensor

from s2kernels.coupling import not_plain
from s2kernels.flat_block import MOMENTS, Block


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
    step_in_backward:
                   gradients of deltas are nowhere in memory: the kernel that computes one does the
                   step of its delta and writes the slice of its weight, once dx is computed. step()
                   counts. It equals two passes to rounding. lr is read in the backward. Every
                   backward must be followed by a step(). After one that failed, the layers that it
                   reached are stepped and the others are not; step() counts those, and then the
                   next one may come.
                   What needs gradients is refused. By RuntimeError before anything changes:
                   retain_graph, create_graph, a delta that several forwards use, several processes;
                   by TypeError fp16. By RuntimeError once it looks for the gradient: the second of
                   several micro-batches, clipping, a GradScaler, a term of the loss that reads a
                   delta. Hooks on a delta, `torch.autograd.grad`, torch.compile, experts and
                   parameters that no kernel of ours trains have ordinary gradients and two passes.
                   A norm of gradients that is logged is 1e12 or more: it stands for "not known".
                   Values that something else writes into a delta must be written as torch counts it
                   (`copy_`, load_state_dict), not through `.data`: forwards of a model write the
                   slices only if a delta has changed since the backward.

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

    Parameters that FSDP2 has sharded (DTensors) stay where FSDP has them: the one launch works on
    the part that each process holds, with moments that are sharded likewise. The optimizer is made
    after `fully_shard`, as any of torch's.

    Raises ValueError for parameters that are not plain floating tensors, such as those on the meta
    device, or that share memory, before any of the group is moved, and RuntimeError for a move that
    comes to light while a CUDA graph is captured. With step_in_backward, ValueError for parameters
    that are neither fp32 nor fp64 or are sharded, and beside accumulate_in_backward.
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
        step_in_backward: bool = False,
    ) -> None:
        if accumulate_in_backward and step_in_backward:
            raise ValueError(
                "accumulate_in_backward keeps the gradients that step_in_backward uses up: give "
                "one of the two"
            )
        self.accumulate_in_backward = accumulate_in_backward
        self.step_in_backward = step_in_backward
        self._blocks: list[list[Block]] = []  # of each group
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
        sharded = any(_sharded(group["params"]) for group in self.param_groups)
        if not (set_to_none or sharded or any(block.foreign_grads() for block in blocks)):
            for block in blocks:
                block.grads.zero_()
            return
        super().zero_grad(set_to_none)

    def forget_backward(self) -> None:
        """Takes it that no parameter was stepped since the last step(): for `s2kernels.capture`,
        whose recordings compute nothing, those that fail included.
        """
        for block in chain.from_iterable(self._blocks):
            block.backward_steps.forget(block)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Parameters that share a step count here have one each, which includes what a
        backward has done that no step() has counted yet.
        """
        ahead: set[Tensor] = set()
        for block in chain.from_iterable(self._blocks):
            done = sorted(block.backward_steps.done)
            block.runs(self.state, done)  # they have a state
            ahead.update(block.params[i] for i in done)
        saved = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for key, state in saved["state"].items():
            saved["state"][key] = state | {"step": state["step"] + (params[key] in ahead)}
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
            shapes = {n: tuple(state[n].shape) if n in state else None for n in MOMENTS}
            if set(shapes.values()) != {tuple(p.shape)}:
                raise ValueError(
                    f"the state of a parameter of shape {tuple(p.shape)} must have {MOMENTS} of "
                    f"that shape, got {shapes}"
                )
        super().load_state_dict(state_dict)
        for index, group in enumerate(self.param_groups):
            group.update(fused=True, foreach=None)
            for block in self._up_to_date(index):
                block.take_states(self.state)
                block.backward_steps.forget(block)

    def _init_group(self, group, values, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps):  # type: ignore[override]
        """What torch's step asks for: the tensors of a group that it is to work on."""
        index = next(i for i, each in enumerate(self.param_groups) if each is group)
        for block in self._up_to_date(index):
            block.backward_steps.count(block, self.state)
            block.collect_grads()
            for run in block.runs(self.state, block.with_grads()):
                # The parameters do not see that their buffer is written: a backward that still
                # needs what they were is to notice it.
                torch.autograd.graph.increment_version(block.params[run])
                span = block.span(run)
                values.append(block.values[span])
                grads.append(block.grads[span])
                exp_avgs.append(block.moments[0][span])
                exp_avg_sqs.append(block.moments[1][span])
                steps.append(block.steps[run.start])
        for p in _sharded(group["params"]):
            if p.grad is None:
                continue
            if not (state := self.state[p]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state.update((name, torch.zeros_like(p)) for name in MOMENTS)
            torch.autograd.graph.increment_version(p)
            grad = p.grad.redistribute(placements=p.placements)
            parts = (each.to_local() for each in (p, grad, *(state[name] for name in MOMENTS)))
            for tensors, part in zip((values, grads, exp_avgs, exp_avg_sqs), parts, strict=True):
                tensors.append(part)
            steps.append(state["step"])
        return False  # nothing complex

    def _up_to_date(self, index: int) -> list["Block"]:
        """The blocks of a group, laid out anew if a parameter has moved or come to need one."""
        params = self.param_groups[index]["params"]
        sharded = _sharded(params)
        if any(p.is_meta for p in sharded) or (sharded and self.step_in_backward):
            raise ValueError(
                "params must be plain floating parameters for step_in_backward, and have "
                f"values, got a DTensor on {sharded[0].device}"
            )
        params = [p for p in params if not isinstance(p, DTensor)]
        while len(self._blocks) <= index:
            self._blocks.append([])
        blocks = self._blocks[index]
        for block in blocks:
            block.group = self.param_groups[index]  # another one after load_state_dict
        held = {id(p) for block in blocks for p in block.params}
        wanted = [p for p in params if p.requires_grad or p.grad is not None or id(p) in held]
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
            if self.step_in_backward and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    "params must be in fp32 for step_in_backward, whose moments have their "
                    f"dtype, got one of shape {tuple(p.shape)} in {p.dtype}"
                )
            alike.setdefault((p.dtype, p.device), []).append(p)
        addresses = [p.data_ptr() for p in wanted if p.numel()]
        if len(set(addresses)) < len(addresses):
            raise ValueError("params must have memory of their own, got two that share theirs")
        group = self.param_groups[index]
        done = {block.params[i] for block in blocks for i in block.backward_steps.done}
        for block in blocks:
            block.runs(self.state, sorted(block.backward_steps.done))  # they have a state
        flags = self.accumulate_in_backward, self.step_in_backward
        blocks = [Block(params, group, *flags) for params in alike.values()]
        for block in blocks:
            block.take_states(self.state)
            block.backward_steps.done |= {i for i, p in enumerate(block.params) if p in done}
        self._blocks[index] = blocks
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        flags = ("accumulate_in_backward", "step_in_backward")
        return super().__getstate__() | {name: getattr(self, name) for name in flags}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_blocks" not in self.__dict__:  # a copy, whose parameters are copies, too
            self._blocks = []
        super().__setstate__(state)


def _sharded(params: Iterable[Tensor]) -> list[DTensor]:
    return [p for p in params if isinstance(p, DTensor)]
