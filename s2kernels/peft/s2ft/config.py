"""What a user chooses, as PEFT configurations are written."""

from dataclasses import dataclass, field
from typing import Any

from s2kernels.autograd.checks import MODES, check_choice
from s2kernels.peft.host.config import AdapterConfig, MethodType, option
from s2kernels.peft.host.model_card import CardText
from s2kernels.select import SCOPES, STRATEGIES

LAYOUTS = ("auto", "permute", "block", "gather")
SELECTIONS = ("random", *STRATEGIES)
BLOCK = 64  # channels in a run of layout="block": whole tiles of the kernels, whole NF4 groups
PEFT_TYPE = MethodType("S2FT")


@dataclass
class S2FTConfig(AdapterConfig):
    """Structured sparse fine-tuning (S2FT, arXiv 2412.06289).

    In every attention and FFN block some heads and channels are trained: the input channels of
    o_proj and down_proj, the output channels of q_proj, k_proj, v_proj, gate_proj and up_proj.
    k_proj and v_proj train the KV heads that the selected query heads read. By default they are
    drawn at random, as a function of (seed, name of the block), and the targets of one block share
    the draw: where their budgets differ, the smaller selection is part of the larger one. In a
    model that a tp_plan of transformers has split, each process trains as many as the others, at
    the same places of its part: budgets are rounded up to that.

    Choices that are out of range raise ValueError or TypeError here or, where the model decides,
    in `get_peft_model`, which then leaves the model as it was.
    """

    target_modules: list[str] | set[str] | str | None = option(
        None,
        "Names of the projections to train, a regular expression, or 'all-linear'. "
        "Default: o_proj and down_proj. Tensors of experts are named in the same way, as "
        "'down_proj' or 'experts.down_proj'; 'all-linear' is without them.",
    )
    heads: int | float = option(
        0.05, "Query heads trained in each attention block: a count (int) or a share (float)."
    )
    channels: int | float = option(
        0.02,
        "Channels trained in each FFN block, and in each expert of a mixture: a count "
        "(int) or a share (float). Of other targets, which layout='gather' admits, so many "
        "input channels are trained.",
    )
    budget_pattern: dict[str, int | float] = field(
        default_factory=dict,
        metadata={
            "help": "Budgets of single targets in the place of heads and channels: a name or the "
            "end of one, or a regular expression for it, and a count or a share: {'v_proj': 1}. "
            "One that is that of no target raises ValueError."
        },
    )
    granularity: int = option(
        1,
        "Channels are selected in runs of so many neighbours, each beginning at a "
        "multiple of that number; the count of channels is rounded up to whole runs. With 16, "
        "what is written of a 16-bit weight is whole 32-byte sectors of a GPU's memory. Heads "
        "are runs already. layout='block' has runs of 64 and takes no other granularity.",
    )
    selection: str = option(
        "random",
        "What decides: 'random', or the scores of s2kernels.select: 'weight', "
        "'activation', 'product', 'gradient'. The last three need calibration data: give the "
        "configuration to s2kernels.peft.select_indices first.",
    )
    largest: bool = option(
        True, "Train the largest scores, or else the smallest; not for 'random'."
    )
    scope: str = option(
        "layer",
        "'layer': the budget holds for each block. 'global': blocks compete, as in the "
        "scripts of the paper, and one may get none; not for tensors of experts.",
    )
    coupled: bool = option(
        True,
        "Targets of one block share a random selection; else each draws its own. "
        "Scores are those of the block, and shared.",
    )
    indices: dict[str, Any] | None = option(
        None,
        "The trained channels themselves, by the name of the target, in the order of "
        "the checkpoint: a list, of experts a list for each. Decides over all of the above; "
        "targets that are not named stay frozen.",
    )
    seed: int = option(0, "Seed of the random selection.")
    mode: str = option(
        "auto",
        "'inplace': the slice is written into the dense weight, forward and dx are one "
        "dense GEMM. 'additive': the slice's part is added to the output of the base layer, "
        "which may be quantized or sharded. 'auto': inplace where it is legal, else additive.",
    )
    layout: str = option(
        "auto",
        "Where the trained channels lie in the weights. 'gather': any channels, where "
        "the checkpoint has them; neighbours are read and written as runs. 'block': the same, "
        "and channels are selected in aligned runs of 64. 'permute': coupled weights of the "
        "live model are permuted so that each slice is contiguous. 'auto' is 'gather', of "
        "targets that the coupling table knows; nothing of the model is moved. Where the same "
        "channels are selected, the results are the same.",
    )
    fuse: bool = option(
        True,
        "Compute a gated FFN with a trained slice as one operation, which keeps gate "
        "and up for the backward and nothing else. What cannot be computed so, as with hooks "
        "on the projections or several active adapters, is not. The results differ by rounding.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        check_choice("mode", self.mode, MODES + ("auto",))
        check_choice("layout", self.layout, LAYOUTS)
        _check_granularity(self.granularity, self.layout)
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("scope", self.scope, SCOPES)
        if self.indices is None and self.selection == "random" and not self.largest:
            raise ValueError(
                "largest=False ranks by scores, which selection='random' does not have"
            )
        if self.indices is None and self.selection != "random" and not self.coupled:
            raise ValueError(
                "coupled=False draws for each target, which goes with selection='random' alone, "
                f"got selection={self.selection!r}"
            )

    def card_text(self) -> CardText:
        chosen = f"selection {self.selection}, heads {self.heads}, channels {self.channels}"
        chosen += f", seed {self.seed}"
        if self.granularity != 1:
            chosen += f", channels in runs of {self.granularity}"
        if self.indices is not None and (self.selection, self.scope) == ("random", "layer"):
            chosen = "given by their indices"  # a random selection within layers leaves none behind
        return CardText(
            "## S2FT adapter",
            ("s2ft", "arxiv:2412.06289"),
            "Structured sparse fine-tuning: of every block some heads and channels were trained\n"
            f"({chosen}). The tensors are in the order of the checkpoint's channels.",
            "Servers that take LoRA adapters take this one after `s2kernels export-lora`, exactly.",
        )


def _check_granularity(value: Any, layout: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"granularity: a number of channels (int) wanted, got {type(value).__name__} {value!r}"
        )
    if value < 1:
        raise ValueError(f"granularity must be at least 1 channel, got {value}")
    if layout == "block" and value not in (1, BLOCK):
        raise ValueError(
            f"granularity={value} does not go with layout='block', whose runs have {BLOCK} "
            "channels: leave one of them out"
        )
