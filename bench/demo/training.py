"""Training loops of the demo: one checkpoint by the clock, then all methods in lockstep."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaForCausalLM

from bench.demo import corpus
from bench.demo.job import EVALUATIONS, FLOOR, Job
from bench.measure import timing
from bench.methods import METHODS, Method


def schedule(progress: float, warm_up: float = 0.05) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0 at progress 1."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up)))


@torch.no_grad()
def held_out_loss(method: Method, batches: Sequence[Tensor]) -> float:
    """Mean loss over batches of one size, nats per byte."""
    method.model.eval()
    losses = [method.loss(batch) for batch in batches]
    method.model.train()
    return float(torch.stack(losses).mean())


def pretrain(
    job: Job, text: Tensor, seconds: float, device: torch.device
) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains a new model in fp32 for `seconds` by the clock, on random windows of `text`.

    The matrix products are in job.dtype. Returns the model in job.dtype, and the seconds of the
    steps, two at least.
    """
    torch.manual_seed(job.seed)
    model = LlamaForCausalLM(job.shape.config(job.length)).to(device)
    method = METHODS["full"](model, job.budget("full"), job.pretrain_lr)
    generator = torch.Generator().manual_seed(job.seed)
    times: list[float] = []
    with tqdm(desc=f"pre-training, {seconds:.0f} s", unit="step") as bar:
        while sum(times) < seconds or len(times) < 2:
            began = time.perf_counter()
            # Not 0, with which the learning rate would be 0.
            progress = max(sum(times) / seconds, 0.01)
            for group in method.optimizer.param_groups:
                group["lr"] = job.pretrain_lr * schedule(progress)
            tokens = corpus.random_batch(text, job.pretrain_batch, job.length, generator).to(device)
            method.zero_grad()
            with torch.autocast(device.type, job.dtype, enabled=job.dtype != torch.float32):
                loss = method.loss(tokens)
            loss.backward()
            method.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)  # waits for the device
            bar.update()
            times.append(time.perf_counter() - began)
    return model.to(job.dtype), times


def finetune(
    methods: Mapping[str, Method],
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    device: torch.device,
) -> tuple[list[dict[str, float]], dict[str, list[Tensor]], dict[str, dict[int, float]]]:
    """One round a batch: each method takes one step on it.

    Returns the seconds of each round by method, the loss of each step of each method, and its
    held-out loss by the number of steps taken: before the first, then `EVALUATIONS` times. In the
    end all learning rates are 0.
    """
    steps = len(batches)
    due = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    before = held_out_loss(methods[FLOOR], held_out)
    curves = {name: {0: before} for name in methods}
    losses: dict[str, list[Tensor]] = {name: [] for name in methods}
    schedulers = [
        LambdaLR(method.optimizer, lambda done: schedule((done + 1) / steps))
        for method in methods.values()
        if method.optimizer is not None
    ]

    def step(name: str) -> None:
        losses[name].append(methods[name].step(batches[len(losses[name])]))

    actions = {name: partial(step, name) for name in methods}
    rounds = []
    timed = timing.interleave(actions, steps, device)
    for seconds in tqdm(timed, f"fine-tuning, {len(methods)} methods", steps, unit="round"):
        rounds.append(seconds)
        for scheduler in schedulers:
            scheduler.step()
        if len(rounds) in due:
            for name, method in methods.items():
                curves[name][len(rounds)] = held_out_loss(method, held_out)
    return rounds, losses, curves
