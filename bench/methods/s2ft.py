"""S2FT, as its users run it: s2kernels.peft on o_proj and down_proj.

Each mode is measured in two layouts. "gather" leaves the order of heads and channels as it is.
"permute" is the paper's co-permutation: the trained channels are moved to the front.
"""

from typing import ClassVar

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.methods.base import Method
from bench.methods.budget import Budget
from s2kernels.coupling import structures
from s2kernels.peft import S2FTConfig, indices_of


class S2FTInplace(Method):
    """The slice is written into the dense weight: one GEMM each way. The FFN is one Function."""

    name = "s2ft_inplace"
    mode: ClassVar[str] = "inplace"
    layout: ClassVar[str] = "gather"
    fuse: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> nn.Module:
        config = S2FTConfig(
            mode=self.mode, layout=self.layout, fuse=self.fuse, task_type="CAUSAL_LM"
        )
        config.indices = indices_of(model, config, draw(model, self.budget))
        config.target_modules = list(config.indices)
        peft = get_peft_model(model, config)
        if self.options.compile:  # else its first forward permutes, which must not be traced
            peft.base_model.keeper.prepare()
        return peft


class S2FTAdditive(S2FTInplace):
    """The base layer as it is, and the slice's part added to its output."""

    name = "s2ft_additive"
    mode = "additive"


class S2FTPermutedInplace(S2FTInplace):
    name = "s2ft_permuted_inplace"
    layout = "permute"


class S2FTPermutedAdditive(S2FTAdditive):
    name = "s2ft_permuted_additive"
    layout = "permute"


class S2FTUnfused(S2FTInplace):
    """The operators of the model as transformers has them, which the floor runs, too."""

    name = "s2ft_unfused"
    fuse = False


def draw(model: PreTrainedModel, budget: Budget) -> dict[str, Tensor]:
    """The trained heads of each attention block and channels of each FFN: ascending, int32.

    Heads come in whole KV groups, but for the last group, which every layout can have. FFN channels
    are drawn one by one.
    """
    generator = torch.Generator().manual_seed(budget.seed)
    drawn = {}
    for name, structure in structures(model).items():
        if structure.kind == "attention":
            groups = torch.arange(structure.num_heads).view(structure.num_kv_heads, -1)
            count = budget.heads
        else:
            groups, count = torch.arange(structure.num_channels).unsqueeze(1), budget.channels
        order = torch.randperm(len(groups), generator=generator)
        drawn[name] = groups[order].flatten()[:count].sort().values.to(torch.int32)
    return drawn
