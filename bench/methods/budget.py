"""How much the methods are to train, so that they can be compared."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

ALIGNED = 8  # S2FT's channels are rounded to so many: GEMMs want rows of 16 bytes


@dataclass(frozen=True)
class Budget:
    """The sizes of every method, and the seed of what they draw."""

    heads: int  # S2FT: query heads of each attention block whose o_proj channels are trained
    channels: int  # S2FT: channels of each FFN block that are trained in down_proj
    rank: int  # LoRA and DoRA, on all linear layers
    seed: int
    shira_rank: int = 32  # SHiRA trains rank * (N + K) entries of each linear layer
    galore_rank: int = 128  # this and the next: the defaults of GaLore's README
    galore_gap: int = 200  # steps from one SVD to the next
    reft_rank: int = 8  # LoReFT: as its users run it
    reft_positions: int = 7  # the first and the last so many
    lisa_layers: int = 2  # LISA: trained at a time, beside the embedding and the head
    lisa_interval: int = 20  # steps from one draw to the next
    # SpIEL: trained entries as a share of all parameters; None for as many as LoRA trains
    spiel_density: float | None = None
    spiel_steps: int = 1000  # of the whole training, towards whose end fewer entries are replaced


def linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(N, K), out_features and in_features, of the linears of a layer, in forward order."""
    return {
        name.rpartition(".")[2]: tuple(module.weight.shape)
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }


def comparable(
    config: PreTrainedConfig, *, rank: int = 16, share: float | None = None, seed: int = 0
) -> Budget:
    """Sizes with which each method trains about as much as LoRA of `rank` on all linear layers.

    With `share` it is this share of all parameters. Full fine-tuning, LISA and LoReFT cannot
    choose: theirs are the sizes that their users take. One half of S2FT's parameters is in o_proj,
    in whole heads, the other in down_proj.

    Raises ValueError for a rank below 1 and a share outside of (0, 1).
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 at least, got {rank}")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes, layers = linears(model), config.num_hidden_layers
    per_rank = layers * sum(n + k for n, k in sizes.values())
    target = rank * per_rank
    if share is not None:
        target = round(share * model.num_parameters())
        rank = max(1, round(target / per_rank))

    (n, k), (hidden, width) = sizes["o_proj"], sizes["down_proj"]
    per_head = layers * n * k // config.num_attention_heads
    heads = min(config.num_attention_heads, round(target / 2 / per_head))
    channels = round((target - heads * per_head) / (layers * hidden))
    if channels > 8 * ALIGNED:
        channels = ALIGNED * round(channels / ALIGNED)
    per_galore_rank = layers * sum(map(max, sizes.values()))
    narrowest = min(map(min, sizes.values()))
    return Budget(
        heads=heads,
        channels=max(1, min(width, channels)),
        rank=rank,
        seed=seed,
        spiel_density=share,
        shira_rank=min(rank, *(n * k // (n + k) for n, k in sizes.values())),
        galore_rank=max(1, min(narrowest, round(target / per_galore_rank))),
        lisa_layers=min(Budget.lisa_layers, layers),
    )
