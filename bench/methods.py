"""The methods side by side: each takes a copy of one checkpoint and trains its part of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from s2kernels.peft import S2FTConfig

FLOOR = "frozen floor"
S2FT = ("s2ft inplace", "s2ft additive")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Budget:
    """How much the parameter-efficient methods train, and the seed of what they draw."""

    heads: int  # S2FT: query heads of each attention block
    channels: int  # S2FT: channels of each FFN block
    rank: int  # LoRA, on all linear layers
    seed: int


@dataclass(frozen=True)
class Method:
    """lr is the peak learning rate of AdamW, None where nothing is trained."""

    name: str
    lr: float | None
    build: Callable[[LlamaForCausalLM, Budget], nn.Module]

    def with_lr(self, scale: float) -> "Method":
        """The method with `scale` times its learning rate."""
        return self if self.lr is None else replace(self, lr=self.lr * scale)


def input_gradients(model: nn.Module):
    """Makes every backward compute dx down to the output of the embedding; returns the handle."""
    embedding = model.get_input_embeddings()
    return embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))


def full(model: LlamaForCausalLM, budget: Budget) -> nn.Module:
    return model.requires_grad_(True)


def frozen(model: LlamaForCausalLM, budget: Budget) -> nn.Module:
    return model


def lora(model: LlamaForCausalLM, budget: Budget) -> nn.Module:
    """LoRA on all linears, adapters in the dtype of the model, which is its fastest form."""
    torch.manual_seed(budget.seed)  # the draw of A
    config = LoraConfig(
        r=budget.rank,
        lora_alpha=2 * budget.rank,
        lora_dropout=0.0,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def s2ft(mode: str) -> Callable[[LlamaForCausalLM, Budget], nn.Module]:
    def build(model: LlamaForCausalLM, budget: Budget) -> nn.Module:
        config = S2FTConfig(
            target_modules=["o_proj", "down_proj"],
            heads=budget.heads,
            channels=budget.channels,
            seed=budget.seed,
            mode=mode,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)

    return build


def in_slices(model: nn.Module) -> dict[str, int]:
    """R of every trained in-slice, by the name of its parameter."""
    return {
        name: parameter.shape[1]
        for name, parameter in model.named_parameters()
        if "s2ft_delta" in name
    }
