"""The two ends of the scale: nothing trained, and everything."""

from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method


class Frozen(Method):
    """The frozen floor: nothing is trained, dx is computed down to the embedding's output."""

    name = "frozen"
    full_depth = True

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model

    def make_optimizer(self, lr: float) -> None:
        return None


class Full(Method):
    """Full fine-tuning: all parameters, and AdamW's states in their dtype."""

    name = "full"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model.requires_grad_(True)
