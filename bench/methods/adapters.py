"""Adapters by PEFT: LoRA in two dtypes, DoRA and SHiRA, each on all linear layers."""

from typing import ClassVar

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.methods.base import Method

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(Method):
    """PEFT's LoRA, without dropout; adapters in the dtype of the model, which is fastest."""

    name = "lora"
    targets: ClassVar[tuple[str, ...]] = LINEARS
    fp32_adapters: ClassVar[bool] = False
    use_dora: ClassVar[bool] = False

    def attach(self, model: PreTrainedModel) -> nn.Module:
        torch.manual_seed(self.budget.seed)  # the draw of A
        config = LoraConfig(
            r=self.budget.rank,
            lora_alpha=2 * self.budget.rank,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
            use_dora=self.use_dora,
        )
        return get_peft_model(model, config, autocast_adapter_dtype=self.fp32_adapters)


class LoRAFP32(LoRA):
    """PEFT's LoRA by default: fp32 adapters, to whose dtype every linear layer casts its x."""

    name = "lora_fp32"
    fp32_adapters = True


class DoRA(LoRA):
    """PEFT's DoRA: LoRA, and the norm of every output channel's weight as a parameter."""

    name = "dora"
    use_dora = True


class SHiRA(Method):
    """PEFT's SHiRA: random entries of the weight.

    Its forward makes a dense copy of the weight plus the entries, and its backward a dense
    gradient of that copy.
    """

    name = "shira"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        config = ShiraConfig(
            r=self.budget.shira_rank,
            random_seed=self.budget.seed,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        )
        config.mask_fn = random_mask
        return get_peft_model(model, config, autocast_adapter_dtype=False)


class Entries(Tensor):
    """A mask of which only `places` are there: the rows and the columns of its ones."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return args[0].places if func is torch.where else args[0]


def random_mask(layer: nn.Linear, r: int, random_seed: int, **others: object) -> Tensor:
    """PEFT's mask, drawn where the weight is: PEFT's own permutes all N K entries on the CPU."""
    device, (n, k) = layer.weight.device, layer.weight.shape
    generator = torch.Generator(device).manual_seed(random_seed)
    drawn = torch.empty(0, dtype=torch.int64, device=device)
    while missing := r * (n + k) - len(drawn):  # as many as were drawn twice
        more = torch.randint(n * k, (missing,), generator=generator, device=device)
        drawn = torch.cat([drawn, more]).unique()
    mask = torch.empty(0).as_subclass(Entries)
    mask.places = drawn // k, drawn % k
    return mask
