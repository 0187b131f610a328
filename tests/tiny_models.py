"""Tiny causal language models of every model type in the coupling table, for exact tests.

Nothing is left at a value that could hide a mistake: every bias that the configuration allows
exists, biases and norm weights are random, query heads outnumber KV heads, and in one type
head_dim is not hidden_size / num_heads.

transformers computes RMSNorm and the softmax of eager attention in fp32 whatever the model's dtype,
which limits a comparison to 1e-6. In fp64 models the norms are therefore `torch.nn.RMSNorm`, which
stays in fp64, and attention is SDPA, which does so too. The rotary table is computed in fp32 from
positions alone: it is the same number on both sides of every comparison and is left as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(num_key_value_heads=2, sliding_window=4),
    "qwen2": dict(),  # biases of q, k, v are part of the architecture
    "qwen3": dict(num_key_value_heads=2, head_dim=6, attention_bias=True),
}

MODEL_TYPES = tuple(_SPECIFIC)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A two-block model of `model_type` in eval mode; `config` overrides configuration entries.

    The values depend on the arguments alone, and the global random state is left as it was.
    """
    model_config = AutoConfig.for_model(
        model_type, **{**_COMMON, **_SPECIFIC[model_type], **config}
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation="sdpa"
        )
    _randomize(model, torch.Generator().manual_seed(seed))
    if dtype == torch.float64:
        _keep_norms_in_fp64(model)
    return model.eval()


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random tokens (batch, length), int64, longer than the sliding window of the tiny Mistral."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_COMMON["vocab_size"], (batch, length), generator=generator)


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # drawn in fp64: models that differ in dtype alone then hold the same values, rounded
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:  # of order 1 all the way through, so that no part is negligible
                value *= parameter.shape[1] ** -0.5
            elif name.endswith("norm.weight"):
                value = 1 + 0.3 * value
            else:
                value *= 0.5
            parameter.copy_(value)


def _keep_norms_in_fp64(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
