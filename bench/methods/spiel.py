"""SpIEL (arXiv 2401.16405), as its users run it: s2kernels.peft on all linear layers."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.measure import memory
from bench.methods.base import Method
from bench.methods.options import Options, Unavailable
from s2kernels.peft import SpIELConfig, SpIELTuner, make_optimizer


class SpIEL(Method):
    """SpIEL-AG: scattered entries of all linear layers, as many as `Budget.spiel_density` says.

    The entries lie in the dense weights. Some are replaced after every `period` steps; to choose
    others, the gradients are watched in the steps before. A step that is made due does all of this
    work at once.
    """

    name = "spiel"
    selection: ClassVar[str] = "accumulated_gradient"
    optimizer_options: ClassVar[dict] = {"betas": (0.9, 0.95)}  # those of `adamw`

    def check(self, options: Options) -> None:
        if options.compile:
            raise Unavailable("compiled, a step does not let SpIEL see gradients and move entries")

    def attach(self, model: PreTrainedModel) -> nn.Module:
        linears = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        wanted = self.budget.rank * sum(sum(weight.shape) for weight in linears)
        if self.budget.spiel_density is not None:
            wanted = max(1, int(self.budget.spiel_density * model.num_parameters()))
        self.config = SpIELConfig(
            num_tunable_weights=min(wanted, sum(weight.numel() for weight in linears)),
            selection=self.selection,
            # "linear" begins by replacing all entries: a run as short as the demo does not recover.
            replacement_schedule="cosine",
            seed=self.budget.seed,
            mode="inplace",
            task_type="CAUSAL_LM",
        )
        self.period = self.config.reselection_steps
        return get_peft_model(model, self.config)

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.model, lr, **self.optimizer_options)
        self.tuner = SpIELTuner(self.model, optimizer, self.budget.spiel_steps)
        return optimizer

    def update(self) -> None:
        super().update()
        self.tuner.step()

    def state_tensors(self) -> Iterator[Tensor]:
        yield from super().state_tensors()
        yield from memory.tensors_in([vars(watch) for watch in self.tuner.watches])

    def make_due(self) -> None:
        # The last step of a window, which begins here: all of it is observed in one step.
        self.tuner.resume(self.period + self.config.accumulation_steps - 1, {}, {})
        steps = range(self.config.accumulation_steps + 1)
        # SpIEL-MA watches no layer.
        for layer, watch in zip(self.tuner.layers, self.tuner.watches, strict=False):
            layer.observers["default"] = lambda dy, x, watch=watch: [
                watch.observe(dy, x) for _ in steps
            ]

    def is_due(self) -> bool:
        return bool(self.tuner.watches) or self.tuner.schedule.reselects(self.tuner.steps + 1)


class SpIELMA(SpIEL):
    """SpIEL-MA: SM3 instead of AdamW; its statistics say which entries are to be trained."""

    name = "spiel_ma"
    selection = "momentum_approximation"
    optimizer_options: ClassVar[dict] = {}
