"""One run: what it trains, on what, and what is measured afterwards."""

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.learning import evaluate
from bench.learning.data import Example, Material
from bench.learning.protocol import RANK, Protocol
from bench.measure import machine
from bench.methods import METHODS, Budget, Method, comparable
from bench.methods.adapters import LoRA
from bench.methods.spiel import SpIEL
from s2kernels.coupling import structures
from s2kernels.peft import S2FTConfig, indices_of, select_indices
from s2kernels.peft.spiel.schedule import Schedule
from s2kernels.select import seeded_generator

BOTH = ("o_proj", "down_proj")
DOWN = ("down_proj",)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Run:
    """Everything that decides a run, beside protocol, model and data.

    kind        "train" on one task, "fuse" adapters of several tasks, a "sequence" of tasks; or one
                of `bench.learning.probes`
    method      a name in bench.methods.METHODS, or "s2ft"
    rank        of LoRA; the others train as many parameters
    projections S2FT: those it trains; LoRA: ("down_proj",) for it alone, otherwise all linears
    channels    S2FT: "random", or a strategy of s2kernels.select with "largest" or "smallest"
    units       S2FT: heads and channels of a block, in the place of what the rank says
    disjoint    S2FT: each task has channels of its own
    replace     SpIEL: entries are replaced while it trains
    density     SpIEL: trained share of all parameters, in the place of what the rank says
    """

    method: str
    lr: float = 0.0
    seed: int = 0
    kind: str = "train"
    tasks: tuple[str, ...] = ("math",)
    rank: int = RANK
    projections: tuple[str, ...] = BOTH
    channels: str = "random"
    units: tuple[int, int] | None = None
    disjoint: bool = False
    replace: bool = True
    density: float | None = None

    def key(self) -> dict:
        """The fields that are not at their defaults, and the method."""
        default = asdict(Run(self.method))
        found = {name: value for name, value in asdict(self).items() if value != default[name]}
        return {"method": self.method} | found


class S2FT(Method):
    """S2FT on given channels: `indices` as in S2FTConfig."""

    name = "s2ft"

    def __init__(
        self, model: PreTrainedModel, budget: Budget, lr: float, config: S2FTConfig
    ) -> None:
        self.config = config
        super().__init__(model, budget, lr)

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return get_peft_model(model, self.config)


class LoRADown(LoRA):
    """LoRA on down_proj alone, where rank 1 of all linear layers would be too much."""

    targets = DOWN


@dataclass
class Bench:
    """What all runs share: the base model in fp32, its tokenizer and the material."""

    base: PreTrainedModel
    tokenizer: Any
    material: Material
    protocol: Protocol

    def perform(self, run: Run) -> dict:
        """Does `run`; returns what it measured.

        Raises ValueError for a task that the material lacks.
        """
        missing = set(run.tasks) - self.material.tasks.keys()
        if missing:
            raise ValueError(f"the run needs --data: it trains on {', '.join(sorted(missing))}")
        torch.manual_seed(run.seed)
        try:
            return {"train": self._train, "fuse": self._fuse, "sequence": self._sequence}[run.kind](
                run
            )
        finally:
            machine.release(torch.device("cpu"))

    def _train(self, run: Run) -> dict:
        merged, found = self.trained(run, self.base, run.tasks[0], 0)
        began = time.perf_counter()
        with self.deployed(merged) as model:
            validation = self.material.tasks[run.tasks[0]].validation
            found["validation loss"] = evaluate.answer_loss(model, validation)
            found["measures"] = self.measured(model)
        found["seconds"]["evaluating"] = time.perf_counter() - began
        return found

    def _fuse(self, run: Run) -> dict:
        """Adapters of all tasks trained apart; each alone, then the sum of their updates."""
        alone, updates = {}, []
        for part, task in enumerate(run.tasks):
            merged, found = self.trained(run, self.base, task, part)
            with self.deployed(merged) as model:
                alone[task] = found | {"tasks": self.task_measures(model, run.tasks)}
            pairs = zip(merged.parameters(), self.base.parameters(), strict=True)
            updates.append([after.detach() - before for after, before in pairs])
        fused = {}
        for weight in (0.5, 1.0):
            model = copy.deepcopy(self.base)
            with torch.no_grad():
                for parameter, *parts in zip(model.parameters(), *updates, strict=True):
                    parameter += weight * sum(parts)
            with self.deployed(model) as deployed:
                fused[str(weight)] = self.task_measures(deployed, run.tasks)
        return {"alone": alone, "fused": fused}

    def _sequence(self, run: Run) -> dict:
        """One task after the other, merged after each; all tasks are measured after each."""
        model, stages = self.base, []
        for part, task in enumerate(run.tasks):
            model, found = self.trained(run, model, task, part)
            with self.deployed(model) as deployed:
                stages.append(found | {"tasks": self.task_measures(deployed, run.tasks)})
        return {"stages": stages}

    def trained(
        self, run: Run, base: PreTrainedModel, task: str, part: int
    ) -> tuple[PreTrainedModel, dict]:
        """A copy of `base` trained on `task` and merged, and how it went. `base` stays as it is."""
        began = time.perf_counter()
        method = self.method(run, base, task, part)
        attached = time.perf_counter()
        order = batches(self.material.tasks[task].train, run.seed, self.protocol)
        losses = fit(method, order, run, self.protocol)
        ended = time.perf_counter()
        found = {
            "trained parameters": method.trained_parameters(),
            "losses": losses,
            "seconds": {"attaching": attached - began, "training": ended - attached},
        }
        model = method.model
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        return model.requires_grad_(False), found

    def method(self, run: Run, base: PreTrainedModel, task: str, part: int) -> Method:
        """The method of `run` at work on a copy of `base`."""
        budget = comparable(base.config, rank=run.rank, seed=run.seed)
        budget = replace(budget, spiel_steps=self.protocol.steps, spiel_density=run.density)
        model = copy.deepcopy(base).train()
        if run.method == "s2ft":
            return S2FT(model, budget, run.lr, self.config(run, base, budget, task, part))
        if run.method == "lora" and run.projections == DOWN:
            return LoRADown(model, budget, run.lr)
        method = METHODS[run.method](model, budget, run.lr)
        if isinstance(method, SpIEL):
            every, watched = self.protocol.reselection
            steps = self.protocol.steps
            method.tuner.schedule = Schedule(steps, every, watched, decay="cosine")
            if not run.replace:
                method.tuner.close()
        return method

    def config(
        self, run: Run, base: PreTrainedModel, budget: Budget, task: str, part: int
    ) -> S2FTConfig:
        """The channels that S2FT trains; `part` counts the tasks that have channels of their own.

        Raises ValueError for disjoint channels where there are not enough.
        """
        heads, channels = run.units or sizes(base, budget, run.projections)
        config = S2FTConfig(
            target_modules=list(run.projections),
            heads=max(1, heads),
            channels=max(1, channels),
            task_type="CAUSAL_LM",
        )
        if run.channels != "random":
            strategy, which = run.channels.split()
            config.selection, config.largest = strategy, which == "largest"
            calibration = self.material.tasks[task].train[: self.protocol.calibration]
            chosen = select_indices(base, config, inputs(calibration), progress=False)
            return chosen
        units = {}
        for name, structure in structures(base).items():
            count = heads if structure.kind == "attention" else channels
            total = structure.count(structure.unit)
            first = part * count if run.disjoint else 0
            if first + count > total:
                raise ValueError(f"{name} has {total} units, {first + count} are wanted")
            order = torch.randperm(total, generator=seeded_generator(run.seed, name))
            units[name] = order[first : first + count].sort().values.to(torch.int32)
        config.indices = indices_of(base, config, units)
        config.target_modules = list(config.indices)
        return config

    @contextmanager
    def deployed(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """A copy of `model` in bf16, as it would be deployed. Its buffers stay as they are."""
        shell = copy.deepcopy(model).eval()
        for parameter in shell.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        yield shell

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        return evaluate.evaluate(model, self.material, self.tokenizer, self.protocol)

    def task_measures(self, model: PreTrainedModel, tasks: tuple[str, ...]) -> dict[str, dict]:
        """Validation loss of each task, and what its test says where it has one."""
        found: dict[str, dict] = {}
        for task in tasks:
            validation = self.material.tasks[task].validation
            found[task] = {"validation loss": evaluate.answer_loss(model, validation)}
        tests = self.material.tests
        if "math" in tasks:
            found["math"]["test loss"] = evaluate.answer_loss(model, tests["easy"])
            found["math"]["test"] = evaluate.exact_answers(
                model, tests["easy"], self.tokenizer, self.protocol
            )
        if "choice" in tasks:
            found["choice"]["test loss"] = evaluate.answer_loss(model, tests["choice"])
            found["choice"]["test"] = evaluate.choice(model, tests["choice"], self.tokenizer)
        return found


def sizes(model: PreTrainedModel, budget: Budget, projections: tuple[str, ...]) -> tuple[int, int]:
    """Heads and channels of each block with which S2FT trains as much as LoRA of budget.rank."""
    if projections == BOTH:
        return budget.heads, budget.channels
    layer = model.model.layers[0]
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    target = budget.rank * sum(sum(m.weight.shape) for m in linears)
    attention = [name for name in projections if name in ATTENTION]
    width = model.config.hidden_size
    if attention:
        per_head = len(attention) * layer.self_attn.head_dim * width
        return max(1, round(target / per_head)), 0
    return 0, max(1, round(target / (len(projections) * width)))


def batches(examples: list[Example], seed: int, protocol: Protocol) -> list[list[Example]]:
    """The problems of every step; none comes twice before all have come once."""
    order: list[Example] = []
    draw = random.Random(seed)
    while len(order) < protocol.steps * protocol.problems:
        order += draw.sample(examples, len(examples))
    size = protocol.problems
    return [order[i * size : (i + 1) * size] for i in range(protocol.steps)]


def inputs(examples: list[Example]) -> list[dict[str, Tensor]]:
    """Examples one by one, as the scores of channels take them."""
    found = []
    for example in examples:
        tokens = torch.tensor([example.prompt + example.answer])
        labels = tokens.clone()
        labels[:, : len(example.prompt)] = -100
        mask = torch.ones_like(tokens)
        found.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
    return found


def fit(method: Method, order: list[list[Example]], run: Run, protocol: Protocol) -> list[float]:
    """Trains for all steps; returns their losses, nats per token of the answers.

    Weights and trained parameters are fp32, the matrix products bf16 (autocast).
    """
    if method.optimizer is None:
        return []
    losses = []
    for step, examples in enumerate(order):
        for group in method.optimizer.param_groups:
            group["lr"] = run.lr * rate(step, protocol)
        method.zero_grad()
        packed = evaluate.row([(e.prompt, e.answer) for e in examples])
        with torch.autocast("cpu", torch.bfloat16):
            loss = evaluate.token_losses(method.model, packed).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(method.trained(), protocol.clip)
        if run.replace:
            method.update()
        else:
            method.optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def rate(step: int, protocol: Protocol) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    warm = max(1, round(protocol.warm_up * protocol.steps))
    return min((step + 1) / warm, (protocol.steps - step) / max(1, protocol.steps - warm + 1))
