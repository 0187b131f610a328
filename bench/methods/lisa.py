"""LISA (arXiv 2403.17919): the embedding, the head, and a few layers that change now and then."""

import torch
from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method, adamw


class LISA(Method):
    """Trains the embedding, the head and `lisa_layers` random layers, all of their parameters.

    After every `lisa_interval` steps other layers are drawn; gradients and optimizer states of
    layers that are no longer trained are dropped. `active` holds the layers trained at present.
    """

    name = "lisa"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        self.period = self.budget.lisa_interval
        self._steps = 0
        self._due = False
        self._generator = torch.Generator().manual_seed(self.budget.seed)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.requires_grad_(True)
        self._ends = [p for p in model.parameters() if p.requires_grad]  # one, where they are tied
        self._draw()
        return model

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        optimizer = adamw(self._ends, lr)
        optimizer.add_param_group({"params": self._active_parameters()})
        return optimizer

    def update(self) -> None:
        super().update()
        self._steps += 1
        if not self._due and self._steps % self.period:
            return
        self._due = False
        before = self._active_parameters()
        self._draw()
        self.optimizer.param_groups[1]["params"] = self._active_parameters()
        for parameter in before:
            if not parameter.requires_grad:
                parameter.grad = None
                self.optimizer.state.pop(parameter, None)

    def make_due(self) -> None:
        self._due = True

    def is_due(self) -> bool:
        """The redraw, and the states that the step after it makes."""
        return self._due or self._steps % self.period in (self.period - 1, 0)

    def _draw(self) -> None:
        layers = self.base.model.layers
        drawn = torch.randperm(len(layers), generator=self._generator)[: self.budget.lisa_layers]
        self.active = tuple(sorted(drawn.tolist()))
        for number, layer in enumerate(layers):
            layer.requires_grad_(number in self.active)

    def _active_parameters(self) -> list[nn.Parameter]:
        return [p for number in self.active for p in self.base.model.layers[number].parameters()]
