"""The two ends of the scale: nothing trained, and everything."""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method
from bench.methods.budget import Budget
from bench.methods.options import Options


class Frozen(Method):
    """The frozen floor: nothing is trained, dx is computed down to the embedding's output."""

    name = "frozen"

    def __init__(
        self,
        model: PreTrainedModel,
        budget: Budget,
        lr: float = 0.0,
        options: Options = Options(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(model, budget, lr, replace(options, full_depth=True))

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model

    def make_optimizer(self, lr: float) -> None:
        return None


class Full(Method):
    """Full fine-tuning: all parameters, and AdamW's states in their dtype."""

    name = "full"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model.requires_grad_(True)
