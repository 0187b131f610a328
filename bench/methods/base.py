"""What every method has: a model, what is trained of it, an optimizer, and one training step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.measure import memory
from bench.methods.budget import Budget
from bench.methods.options import Options


class Method(ABC):
    """One way of fine-tuning, attached to one model, as its users run it.

    model      what a step runs: the given model, or a PeftModel around it
    base       the given model; its layers are changed where the method changes layers
    optimizer  of what is trained; None where nothing is
    full_depth whether dx is computed down to the embedding, not to the first trained layer
    period     of work that is done once in so many steps; None where all steps are alike. The cost
               of a step has 1 / period of it. A method with a period has make_due(): its next step
               does all of that work.
    """

    name: ClassVar[str]
    period: int | None = None
    full_depth = False
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, model: PreTrainedModel, budget: Budget, lr: float, options: Options | None = None
    ) -> None:
        """Takes over `model`: freezes it, attaches what is trained, makes the optimizer.

        Raises Unavailable where a package or the device lacks what the method or an option needs;
        the model is then as it was.
        """
        options = options or Options()
        self.check(options)
        options.before(model)
        self.budget, self.options, self.base = budget, options, model
        model.requires_grad_(False)
        self.model = self.attach(model).train()
        options.after(self.model, model)
        self.full_depth |= options.full_depth
        self.optimizer = self.make_optimizer(lr)

    def check(self, options: Options) -> None:  # noqa: B027  (most methods have nothing to say)
        """Raises Unavailable where the method cannot run here with `options`."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> nn.Module:
        """Makes the trained parameters and sets `requires_grad`; returns what a step runs."""

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer | None:
        trained = self.trained()
        return adamw(trained, lr) if trained else None

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained at present, by its name in `model`."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def trained(self) -> list[nn.Parameter]:
        """What is trained at present."""
        return [parameter for _, parameter in self.named_trained()]

    def trained_parameters(self) -> int:
        """How many numbers are trained at present."""
        return sum(parameter.numel() for parameter in self.trained())

    def state_tensors(self) -> Iterator[Tensor]:
        """What the optimizer holds between steps."""
        return iter(()) if self.optimizer is None else memory.states(self.optimizer)

    def zero_grad(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean next-token cross entropy in nats; batch int64 (sequences, length)."""
        inputs = {"input_ids": batch}
        if self.full_depth:  # dx stops at what asks for it
            inputs = {"inputs_embeds": self.base.get_input_embeddings()(batch).requires_grad_(True)}
        return self.model(**inputs, labels=batch, use_cache=False).loss

    def update(self) -> None:
        """The optimizer's step and all that belongs to it."""
        if self.optimizer is not None:
            self.optimizer.step()

    def step(self, batch: Tensor) -> Tensor:
        """zero_grad, forward, backward, update; returns the loss, detached."""
        self.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.update()
        return loss.detach()

    def is_due(self) -> bool:
        """Whether the next step does some of the periodic work."""
        return False


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The optimizer of the methods that bring none; its states have the parameters' dtype."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
