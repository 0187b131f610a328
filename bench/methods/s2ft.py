"""S2FT, as its users run it: s2kernels.peft on o_proj and down_proj.

Each mode is measured in two layouts. "gather" leaves the order of heads and channels as it is.
"permute" is the paper's co-permutation: the trained channels are moved to the front.
"""

from typing import ClassVar

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method
from bench.methods.budget import Budget
from s2kernels.peft import S2FTConfig


class S2FTInplace(Method):
    """The slice is written into the dense weight: forward and dx are one dense GEMM each.

    The FFN is one Function, as it is by default.
    """

    name = "s2ft_inplace"
    mode: ClassVar[str] = "inplace"
    layout: ClassVar[str] = "gather"
    fuse: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> nn.Module:
        indices = draw(model, self.budget)
        config = S2FTConfig(
            target_modules=list(indices),
            indices=indices,
            mode=self.mode,
            layout=self.layout,
            fuse=self.fuse,
            task_type="CAUSAL_LM",
        )
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


def draw(model: PreTrainedModel, budget: Budget) -> dict[str, list[int]]:
    """The trained channels of each o_proj and down_proj, in the order of the checkpoint.

    Heads come in whole KV groups, but for the last group, which every layout can have. FFN channels
    are drawn one by one.
    """
    generator = torch.Generator().manual_seed(budget.seed)
    config, indices = model.config, {}
    groups = torch.arange(config.num_attention_heads).view(config.num_key_value_heads, -1)
    for name, module in model.named_modules():
        if name.endswith(".self_attn") and budget.heads:
            order = torch.randperm(len(groups), generator=generator)
            heads = groups[order].flatten()[: budget.heads].sort().values
            channels = torch.arange(module.o_proj.in_features).view(config.num_attention_heads, -1)
            indices[f"{name}.o_proj"] = channels[heads].flatten().tolist()
        elif name.endswith(".mlp"):
            channels = torch.randperm(module.down_proj.in_features, generator=generator)
            indices[f"{name}.down_proj"] = channels[: budget.channels].sort().values.tolist()
    return indices


def in_slices(model: nn.Module) -> dict[str, int]:
    """R of every trained in-slice, by the name of its parameter."""
    return {
        name: parameter.shape[1]
        for name, parameter in model.named_parameters()
        if "s2ft_delta" in name
    }
