"""Training loops of the demo: one checkpoint by the clock, then all methods in lockstep."""

import copy
import math
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from bench.demo import corpus
from bench.demo.job import Entrant, Job
from bench.measure import timing
from bench.methods import Options
from bench.methods.base import adamw


class Run:
    """A method at work in the demo: its peak learning rate and the loss of every step.

    dx is computed all the way down, as in the floor. Otherwise a method whose first trained layer
    lies further up would be compared at another depth of the backward.
    """

    def __init__(self, entrant: Entrant, base: LlamaForCausalLM, job: Job):
        self.lr = None if entrant.lr is None else entrant.lr * job.lr_scale
        model, budget = copy.deepcopy(base), job.budget(entrant)
        self.method = entrant.method(model, budget, self.lr or 0.0, Options(full_depth=True))
        self.losses: list[Tensor] = []

    @property
    def model(self) -> nn.Module:
        return self.method.model

    def step(self, batch: Tensor) -> None:
        """What the clock sees: forward, backward and, where something is trained, the optimizer."""
        self.losses.append(self.method.step(batch))

    def set_lr(self, factor: float) -> None:
        """The learning rate, as a share of the peak."""
        if self.method.optimizer is not None:
            for group in self.method.optimizer.param_groups:
                group["lr"] = self.lr * factor


def schedule(progress: float, warm_up: float = 0.05) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0 at progress 1."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up)))


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte; batch int64 (sequences, length)."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Mean loss over batches of one size, nats per byte."""
    model.eval()
    losses = [next_token_loss(model, batch) for batch in batches]
    model.train()
    return float(torch.stack(losses).mean())


def pretrain(
    job: Job, text: Tensor, seconds: float, device: torch.device
) -> tuple[LlamaForCausalLM, list[float], list[float]]:
    """Trains a new model in fp32 for `seconds` by the clock, on random windows of `text`.

    The matrix products are in job.dtype. Returns the model in job.dtype, and losses and seconds of
    the steps, two at least.
    """
    torch.manual_seed(job.seed)
    model = LlamaForCausalLM(job.shape.config(job.length)).to(device)
    generator = torch.Generator().manual_seed(job.seed)
    optimizer = adamw(list(model.parameters()), job.pretrain_lr)
    losses: list[float] = []
    marks = [time.perf_counter()]
    end = marks[0] + seconds
    with tqdm(desc=f"pre-training, {seconds:.0f} s", unit="step") as bar:
        while marks[-1] < end or len(losses) < 2:
            # The first steps count for the warm-up as if one second had passed.
            progress = max(seconds - (end - marks[-1]), min(1.0, seconds / 100)) / seconds
            for group in optimizer.param_groups:
                group["lr"] = job.pretrain_lr * schedule(progress)
            tokens = corpus.random_batch(text, job.pretrain_batch, job.length, generator).to(device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, job.dtype, enabled=job.dtype != torch.float32):
                loss = next_token_loss(model, tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            marks.append(time.perf_counter())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    times = [later - earlier for earlier, later in pairwise(marks)]
    return model.to(job.dtype), losses, times


def finetune(
    runs: Mapping[str, Run],
    batches: list[Tensor],
    held_out: list[Tensor],
    evaluations: int,
    device: torch.device,
) -> tuple[list[dict[str, float]], dict[str, dict[int, float]]]:
    """One round a batch: each method takes one step on it.

    Returns the seconds of each round by method, and the held-out loss of each method by the number
    of steps taken: before the first, after the last, `evaluations` in all after the start.
    """
    steps = len(batches)
    due = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
    before = held_out_loss(next(iter(runs.values())).model, held_out)
    curves = {name: {0: before} for name in runs}
    actions = {
        name: (lambda run=run: run.step(batches[len(run.losses)])) for name, run in runs.items()
    }
    seconds = []

    def set_lr(step: int) -> None:
        for run in runs.values():
            run.set_lr(schedule((step + 1) / steps))

    set_lr(0)
    with tqdm(total=steps, desc=f"fine-tuning, {len(runs)} methods", unit="round") as bar:
        for step, times in enumerate(timing.interleave(actions, steps, device), start=1):
            seconds.append(times)
            if step in due:
                for name, run in runs.items():
                    unchanged = run.method.optimizer is None
                    loss = before if unchanged else held_out_loss(run.model, held_out)
                    curves[name][step] = loss
            set_lr(step)
            losses = " ".join(f"{float(run.losses[-1]):.3f}" for run in runs.values())
            bar.set_postfix_str(f"losses {losses}", refresh=False)
            bar.update()
    return seconds, curves
