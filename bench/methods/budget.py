"""How much the methods are to train, so that they can be compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

ALIGNED = 8  # S2FT's channels are rounded to so many: GEMMs want rows of 16 bytes


@dataclass(frozen=True)
class Budget:
    """The sizes of every method, and the seed of what they draw."""

    heads: int  # S2FT: query heads of each attention block whose o_proj channels are trained
    channels: int  # S2FT: channels of each FFN block that are trained in down_proj
    rank: int  # LoRA and DoRA, on all linear layers
    seed: int
    shira_rank: int = 32  # SHiRA trains rank * (N + K) entries of each linear layer
    galore_rank: int = 128  # this and the next two: the defaults of GaLore's README
    galore_gap: int = 200  # steps from one SVD to the next
    galore_scale: float = 0.25
    reft_rank: int = 8  # LoReFT: as its users run it
    reft_positions: int = 7  # the first and the last so many
    lisa_layers: int = 2  # LISA: trained at a time, beside the embedding and the head
    lisa_interval: int = 20  # steps from one draw to the next
    # SpIEL: trained entries as a share of all parameters; None for as many as LoRA trains
    spiel_density: float | None = None
    spiel_steps: int = 1000  # of the whole training, towards whose end fewer entries are replaced


class Sizes:
    """What a model of `config` has, counted on the meta device."""

    def __init__(self, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config)
        self.layers = len(self._model.model.layers)
        self.heads = config.num_attention_heads
        self.hidden = config.hidden_size

    @cached_property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linear layers of one block, by the name of the projection."""
        return {
            name.rpartition(".")[2]: tuple(module.weight.shape)
            for name, module in self._model.model.layers[0].named_modules()
            if isinstance(module, nn.Linear)
        }

    def of_linears(self, count: Callable[[int, int], int]) -> int:
        """The sum of count(N, K) over all linear layers of all blocks."""
        return self.layers * sum(count(n, k) for n, k in self.layer_linears.values())

    @cached_property
    def parameters(self) -> int:
        """All of them, shared ones once."""
        return sum(p.numel() for p in self._model.parameters())

    @cached_property
    def layer_parameters(self) -> int:
        return sum(p.numel() for p in self._model.model.layers[0].parameters())

    @cached_property
    def embedding_and_head(self) -> int:
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        return sum(p.numel() for p in {id(end.weight): end.weight for end in ends}.values())

    @property
    def per_head(self) -> int:
        """Parameters that S2FT trains in a model for one head of each block."""
        n, k = self.layer_linears["o_proj"]
        return self.layers * n * k // self.heads

    @property
    def per_channel(self) -> int:
        """Parameters that S2FT trains in a model for one FFN channel of each block."""
        return self.layers * self.layer_linears["down_proj"][0]


def entries_in_all(budget: Budget, parameters: int, linears: list[tuple[int, int]]) -> int:
    """Entries that SpIEL is to train: at most those of the linear layers.

    parameters: of the whole model. linears: (N, K) of each linear layer of its blocks.
    """
    wanted = budget.rank * sum(n + k for n, k in linears)
    if budget.spiel_density is not None:
        wanted = max(1, int(budget.spiel_density * parameters))
    return min(wanted, sum(n * k for n, k in linears))


def entries_of_layers(entries: int, linears: list[tuple[int, int]]) -> list[int]:
    """How many of the entries fall to each layer: in proportion to its size, 1 at least."""
    total = sum(n * k for n, k in linears)
    return [max(1, entries * n * k // total) for n, k in linears]


def comparable(
    config: PreTrainedConfig,
    *,
    rank: int | None = None,
    share: float | None = None,
    seed: int = 0,
) -> Budget:
    """Sizes with which each method trains about as many parameters as LoRA of `rank`.

    LoRA is on all linear layers; its rank is 16 if nothing is given. With `share` each method
    trains this share of all parameters instead. Full fine-tuning, LISA and LoReFT cannot choose
    how much they train: theirs are the sizes that their users take. One half of S2FT's parameters
    is in o_proj, in whole heads, the other in down_proj.

    Raises ValueError for a rank below 1, a share outside of (0, 1), and both at once.
    """
    if rank is not None and share is not None:
        raise ValueError(f"one of rank and share wanted, got rank={rank} and share={share}")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    sizes = Sizes(config)
    per_rank = sizes.of_linears(lambda n, k: n + k)
    if share is not None:
        target = round(share * sizes.parameters)
        rank = max(1, round(target / per_rank))
    else:
        rank = 16 if rank is None else rank
        if rank < 1:
            raise ValueError(f"rank must be 1 at least, got {rank}")
        target = rank * per_rank

    channels_in_all = sizes.layer_linears["down_proj"][1]
    heads = min(sizes.heads, round(target / 2 / sizes.per_head))
    channels = round((target - heads * sizes.per_head) / sizes.per_channel)
    if channels > 8 * ALIGNED:
        channels = ALIGNED * round(channels / ALIGNED)
    channels = max(1, min(channels_in_all, channels))
    narrowest = min(min(shape) for shape in sizes.layer_linears.values())
    budget = Budget(
        heads=heads,
        channels=channels,
        rank=rank,
        seed=seed,
        spiel_density=share,
        shira_rank=min(rank, *(n * k // (n + k) for n, k in sizes.layer_linears.values())),
        galore_rank=max(
            1, min(narrowest, round(target / sizes.of_linears(lambda n, k: max(n, k))))
        ),
    )
    return replace(budget, lisa_layers=min(budget.lisa_layers, sizes.layers))
