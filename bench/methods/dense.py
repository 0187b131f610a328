"""Whole parameters: none of them is trained, all are, or those of a few layers at a time."""

import torch
from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method


class Frozen(Method):
    """The frozen floor: nothing is trained, dx is computed down to the embedding's output."""

    name = "frozen"
    full_depth = True

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model


class Full(Method):
    """Full fine-tuning: all parameters, and AdamW's states in their dtype."""

    name = "full"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        return model.requires_grad_(True)


class LISA(Method):
    """LISA (arXiv 2403.17919): the embedding, the head and `lisa_layers` random layers.

    After every `lisa_interval` steps other layers are drawn; gradients and optimizer states of
    layers that are no longer trained are dropped.
    """

    name = "lisa"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        self.period = self.budget.lisa_interval
        self._generator = torch.Generator().manual_seed(self.budget.seed)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.requires_grad_(True)
        self._draw()
        return model

    def update(self) -> None:
        super().update()
        self._steps_left -= 1
        if self._steps_left:
            return
        self._draw()
        self.optimizer.param_groups[0]["params"] = self.trained()
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
                self.optimizer.state.pop(parameter, None)

    def make_due(self) -> None:
        self._steps_left = 1

    def is_due(self) -> bool:
        """The redraw, and the states that the step after it makes."""
        return self._steps_left in (1, self.period)

    def _draw(self) -> None:
        self._steps_left = self.period
        layers = self.base.model.layers
        drawn = torch.randperm(len(layers), generator=self._generator)[: self.budget.lisa_layers]
        for number, layer in enumerate(layers):
            layer.requires_grad_(number in drawn)
