"""The small Llama and the random adapters of the benchmarks of serving, and a step of decoding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2kernels.adapter import Slice

HIDDEN, LAYERS, HEAD, FFN, VOCAB = 512, 4, 64, 1376, 2048


def llama(hidden: int = HIDDEN, ffn: int = FFN) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        vocab_size=VOCAB,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def adapter(
    seed: int, of_o: int = HEAD, of_down: int = 28, hidden: int = HIDDEN, ffn: int = FFN
) -> dict[str, Slice]:
    """So many channels of each o_proj, in whole heads but for the last, and of each down_proj."""
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for layer in range(LAYERS):
        heads = (
            torch.randperm(hidden // HEAD, generator=generator)[: -(-of_o // HEAD)].sort().values
        )
        o_index = (heads[:, None] * HEAD + torch.arange(HEAD)).flatten()[:of_o]
        ffn_index = torch.randperm(ffn, generator=generator)[:of_down]
        for name, index in (("self_attn.o_proj", o_index), ("mlp.down_proj", ffn_index)):
            delta = torch.randn(hidden, len(index), generator=generator) * 0.02
            slices[f"model.layers.{layer}.{name}"] = Slice("in", index.int(), delta)
    return slices


def decoding(model: nn.Module, rows: int, length: int = 16) -> Callable[[], Tensor]:
    """One step of `rows` sequences that are `length` tokens long."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=torch.randint(0, VOCAB, (rows, length)), past_key_values=cache, use_cache=True
        )
    token = torch.randint(0, VOCAB, (rows, 1))

    def step() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step
