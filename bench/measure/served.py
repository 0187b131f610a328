"""The small Llama and the random adapters of the benchmarks of serving, and a step of decoding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2kernels.adapter import Slice

HIDDEN, LAYERS, HEAD, FFN = 512, 4, 64, 1376


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        vocab_size=2048,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def adapter(seed: int, heads_of_o: int = HEAD, channels: int = 28) -> dict[str, Slice]:
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for layer in range(LAYERS):
        head = int(torch.randint(HIDDEN // HEAD, (), generator=generator)) * HEAD
        o_index = torch.arange(head, head + heads_of_o, dtype=torch.int32)
        ffn_index = torch.randperm(FFN, generator=generator)[:channels].int()
        for name, index in (("self_attn.o_proj", o_index), ("mlp.down_proj", ffn_index)):
            delta = torch.randn(HIDDEN, len(index), generator=generator) * 0.02
            slices[f"model.layers.{layer}.{name}"] = Slice("in", index, delta)
    return slices


def decoding(model: nn.Module, rows: int, length: int = 16) -> Callable[[], Tensor]:
    """One step of `rows` sequences that are `length` tokens long."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=torch.randint(0, 2048, (rows, length)), past_key_values=cache, use_cache=True
        )
    token = torch.randint(0, 2048, (rows, 1))

    def step() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step
