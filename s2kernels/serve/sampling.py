"""Temperature and top-p for each request of continuous batching; temperature 0 is greedy."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from s2kernels.serve.continuous import AdapterManager


def configure(generation: GenerationConfig, batching: ContinuousBatchingConfig) -> None:
    """Have a manager that is made with these take temperature and top_p in add_request.

    transformers makes a processor for what is not at its neutral value alone.
    """
    generation.do_sample = True
    generation.temperature = generation.top_p = 0.5
    generation.top_k = 0
    batching.per_request_processors = True


def complete(manager: AdapterManager) -> None:
    """Have a temperature of 0 mean greedy; before the first request."""
    processors: list[Any] = manager.logit_processor.logits_processor
    for place, processor in enumerate(processors):  # their arguments have equal names
        if isinstance(processor, ContinuousBatchingTemperatureLogitsWarper):
            processors[place] = _Temperature(cast(Any, processor))
        elif isinstance(processor, ContinuousBatchingTopPLogitsWarper):
            processors[place] = _TopP(cast(Any, processor))


class _Temperature(ContinuousBatchingTemperatureLogitsWarper):
    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        temperature = tensor_arg[: len(scores)].view(torch.float32)[:, None]
        best = scores.argmax(-1, keepdim=True)
        greedy = torch.full_like(scores, -torch.inf).scatter_(-1, best, 0.0)
        smallest = torch.finfo(torch.float32).tiny
        return torch.where(temperature > 0, scores / temperature.clamp(min=smallest), greedy)


class _TopP(ContinuousBatchingTopPLogitsWarper):
    """Sorts the vocabulary only where a request of the batch asks for it."""

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        self._needed = any(
            request.state.logit_processor_kwargs.get("top_p", 1.0) < 1.0
            for request in requests_with_new_token
        )
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return super().__call__(scores, tensor_arg) if self._needed else scores
