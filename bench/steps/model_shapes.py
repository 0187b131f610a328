"""Model shapes by name, and models of these shapes with random weights.

Time and bytes of a training step depend neither on the values of the weights nor on, say, the base
of the rotary angles, which is left at its default.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from bench.methods.budget import linears

# A prime: no two rows of a weight are equal, unless it has more than DRAWN of them.
DRAWN = 2**20 + 7


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Llama family.

    layers: those that are built; of_layers: those of the whole model, more than layers if cut. So
    with vocab and of_vocab, the rows of embedding and head.
    tied: the embedding is the weight of the head as well.
    """

    name: str
    model_type: str  # as transformers calls it
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    of_layers: int
    of_vocab: int
    tied: bool = False

    def cut(self, layers: int, vocab: int | None = None) -> "Shape":
        """The whole model with its first `layers` layers only, and with `vocab` tokens if given."""
        return replace(self, layers=layers, vocab=vocab or self.of_vocab)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K), out_features and in_features, of the linears of one layer, in forward order."""
        return linears(self.cut(1)._without_content())

    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return self._without_content().num_parameters()

    def config(self, length: int) -> PreTrainedConfig:
        """The configuration of transformers, for sequences of up to `length` tokens."""
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=length,
            tie_word_embeddings=self.tied,
        )

    def build(
        self, length: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> PreTrainedModel:
        """The model with random weights in `dtype` on `device`, frozen, in training mode.

        The weights depend on seed, dtype and kind of device.
        """
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                self.config(length), dtype=dtype, attn_implementation="sdpa"
            )
        model.tie_weights()
        fill_(model.requires_grad_(False), seed)
        return model.train()

    def _without_content(self) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config(1))


def fill_(model: PreTrainedModel, seed: int) -> None:
    """Norms are set to one, every other parameter is drawn from a normal distribution.

    Of a large parameter DRAWN numbers are drawn and repeated: a CPU draws but 1e8 a second.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            continue
        flat = parameter.data.view(-1)
        drawn = flat[:DRAWN].normal_(0.0, model.config.initializer_range, generator=generator)
        rest = len(flat) % len(drawn)
        flat[: len(flat) - rest].view(-1, len(drawn))[1:] = drawn
        flat[len(flat) - rest :] = drawn[:rest]


def whole(name: str, model_type: str, *widths: int, tied: bool = False) -> Shape:
    """widths: from hidden to vocab, in the order of Shape."""
    return Shape(name, model_type, *widths, of_layers=widths[2], of_vocab=widths[-1], tied=tied)


# From the published configurations; "small" and "toy" are ours, for machines without a GPU.
TABLE = {
    shape.name: shape
    for shape in (
        whole("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 128, 32000),
        whole("llama-2-13b", "llama", 5120, 13824, 40, 40, 40, 128, 32000),
        whole("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256),
        whole("llama-3-70b", "llama", 8192, 28672, 80, 64, 8, 128, 128256),
        whole("llama-3.1-405b", "llama", 16384, 53248, 126, 128, 8, 128, 128256),
        whole("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064),
        whole("qwen3-8b", "qwen3", 4096, 12288, 36, 32, 8, 128, 151936),
        whole("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, tied=True),
        whole("tinyllama-1.1b", "llama", 2048, 5632, 22, 32, 4, 64, 32000),
        whole("small", "llama", 512, 1408, 8, 8, 4, 64, 2048),
        whole("toy", "llama", 64, 176, 2, 4, 2, 16, 256),
    )
}
