"""Tiny language models of every model type in the coupling table, for exact tests.

Nothing is left at a value that could hide a mistake: every bias that the configuration allows
exists, biases and norm weights are random, query heads outnumber KV heads where they can, in some
types head_dim is not hidden_size / num_heads, and one model has a dense FFN and a mixture.

transformers computes RMSNorm, routers and the softmax of eager attention in fp32 whatever the
model's dtype, which limits a comparison to 1e-6. In fp64 models the norms are therefore
`torch.nn.RMSNorm`, which stays in fp64, routers are the ones below, and attention is SDPA, which
does so too, or for Gemma 2, which has none, the one below. The rotary table is computed in fp32
from positions alone: it is the same number on both sides of every comparison and is left as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

_COMMON: dict[str, Any] = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPS_OF_2 = dict(num_key_value_heads=4)
_GROUPS_OF_4 = dict(num_key_value_heads=2)
_BERT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True, **_GROUPS_OF_2),
    "mistral": dict(sliding_window=4, **_GROUPS_OF_4),
    "qwen2": _GROUPS_OF_2,  # biases of q, k, v are part of the architecture
    "qwen3": dict(head_dim=6, attention_bias=True, **_GROUPS_OF_4),
    "gemma2": dict(head_dim=6, attention_bias=True, sliding_window=4, **_GROUPS_OF_2),
    "gemma3_text": dict(head_dim=6, attention_bias=True, sliding_window=4, **_GROUPS_OF_4),
    "phi3": _GROUPS_OF_2,
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": dict(rotary_pct=0.5),
    "opt": dict(dropout=0.0, word_embed_proj_dim=32),
    "bert": _BERT,
    "roberta": _BERT,
    "mixtral": dict(num_local_experts=4, **_GROUPS_OF_4),
    "qwen3_moe": dict(
        attention_bias=True,
        mlp_only_layers=[0],
        moe_intermediate_size=24,
        norm_topk_prob=True,
        num_experts=4,
        num_experts_per_tok=2,
        **_GROUPS_OF_2,
    ),
}
_OWN_NAMES = {
    "gpt2": {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim"},
}

MODEL_TYPES = tuple(_SPECIFIC)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A two-block model of `model_type` in eval mode; `config` overrides configuration entries.

    The values depend on the arguments alone, and the global random state is left as it was.
    """
    fields = {**_COMMON, **_SPECIFIC[model_type], **config}
    own_names = _OWN_NAMES.get(model_type, {})
    model_config = AutoConfig.for_model(
        model_type, **{own_names.get(name, name): value for name, value in fields.items()}
    )
    auto = AutoModelForMaskedLM if "bert" in model_type else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(
            model_config,
            dtype=dtype,
            attn_implementation="any_dtype" if model_type == "gemma2" else "sdpa",
            experts_implementation="eager",
        )
    _randomize(model, torch.Generator().manual_seed(seed))
    if dtype == torch.float64:
        keep_in_fp64(model)
    return model.eval()


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random tokens (batch, length), int64, longer than the sliding window of the tiny Mistral."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_COMMON["vocab_size"], (batch, length), generator=generator)


def checkpoint_activations(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Checkpoints every block. transformers renamed the method, and 5.17 has the old name alone."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # drawn in fp64: models that differ in dtype alone then hold the same values, rounded
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            owner, _, attribute = name.rpartition(".")
            if parameter.ndim > 1:  # of order 1 all the way through, so that no part is negligible
                axis = 0 if isinstance(model.get_submodule(owner), Conv1D) else -1
                value *= parameter.shape[axis] ** -0.5
            elif attribute == "weight":  # of a norm
                value = 1 + 0.3 * value
            else:
                value *= 0.5
            parameter.copy_(value)


def keep_in_fp64(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            is_gemma = kind.startswith("Gemma")
            eps = module.eps if is_gemma else module.variance_epsilon
            norm = nn.RMSNorm(module.weight.shape[0], eps=eps)
            norm.weight = nn.Parameter(1 + module.weight) if is_gemma else module.weight
            model.set_submodule(name, norm)
        elif kind.endswith("TopKRouter"):
            model.set_submodule(name, _Router(module))


class _Router(nn.Module):
    """What Mixtral's and Qwen's routers do, in the dtype of the model."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.t()
        scores, experts = logits.softmax(-1).topk(self.top_k)
        return logits, scores / scores.sum(-1, keepdim=True), experts


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Gemma 2's eager attention, with the softmax in the dtype of the model."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("any_dtype", _attention)
AttentionMaskInterface.register("any_dtype", eager_mask)
