"""S2FT, as its users run it: s2kernels.peft on o_proj and down_proj."""

from typing import ClassVar

from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from bench.methods.base import Method
from s2kernels.peft import S2FTConfig


class S2FTInplace(Method):
    """The slice is written into the dense weight: forward and dx are one dense GEMM each.

    The FFN is one Function, and q and k are one GEMM, as they are by default.
    """

    name = "s2ft_inplace"
    mode: ClassVar[str] = "inplace"
    fuse: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> nn.Module:
        budgets = {"o_proj": self.budget.heads, "down_proj": self.budget.channels}
        config = S2FTConfig(
            target_modules=[target for target, count in budgets.items() if count],
            heads=self.budget.heads,
            channels=self.budget.channels,
            seed=self.budget.seed,
            mode=self.mode,
            layout=self.layout(),
            fuse=self.fuse,
            task_type="CAUSAL_LM",
        )
        peft = get_peft_model(model, config)
        if self.options.compile:  # its first forward permutes, which is not to be traced
            peft.base_model.keeper.engage()
        return peft

    def layout(self) -> str:
        return "auto"


class S2FTUnfused(S2FTInplace):
    """The operators of the model as transformers has them, as the floor runs them, too."""

    name = "s2ft_unfused"
    fuse = False


class S2FTAdditive(S2FTInplace):
    """The base layer as it is, and the slice's part added to its output."""

    name = "s2ft_additive"
    mode = "additive"

    def layout(self) -> str:
        # This one torch.compile takes in one graph.
        return "gather" if self.options.compile else "auto"


def in_slices(model: nn.Module) -> dict[str, int]:
    """R of every trained in-slice, by the name of its parameter."""
    return {
        name: parameter.shape[1]
        for name, parameter in model.named_parameters()
        if "s2ft_delta" in name
    }
