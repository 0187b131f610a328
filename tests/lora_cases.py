"""S2FT adapters of a tiny Llama and of a toy base, and what is in the LoRA made of one."""

import torch
from peft import get_peft_model
from tiny_models import tiny_model
from torch import nn

from s2kernels.adapter import Slice, read_files, write_adapter
from s2kernels.peft import S2FTConfig

WIDE = dict(intermediate_size=192)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def s2ft_model(targets=None, dtype=torch.float32, **fields):
    """A tiny Llama with an S2FT adapter whose deltas are random: R differs between modules.

    Additive and in the original order unless `fields` say otherwise: the sums are then those of a
    LoRA, in the same order.
    """
    choice = dict(heads=2, channels=11, seed=3, mode="additive", layout="gather")
    fields = choice | dict(target_modules=targets) | fields
    model = get_peft_model(tiny_model("llama", dtype, **WIDE), S2FTConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "s2ft_delta" in name:
                delta.copy_(0.3 * torch.randn(delta.shape, generator=generator, dtype=delta.dtype))
    return model


def lora_of(path):
    """(lora_A, lora_B) by module, and the configuration."""
    config, tensors = read_files(path)
    names = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    factors = {}
    for name in names:
        prefix = f"base_model.model.{name}.lora_"
        factors[name] = tensors[prefix + "A.weight"], tensors[prefix + "B.weight"]
    return factors, config


def dense(part, shape):
    weight = torch.zeros(shape, dtype=part.delta.dtype)
    where = (slice(None), part.index.long()) if part.dim == "in" else (part.index.long(),)
    weight[where] = part.delta
    return weight


class Toy(nn.Module):
    """A base of one attention and one gated FFN block, of any width."""

    def __init__(self, hidden=6, ffn=600, names=ALL):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        with torch.device("meta"):
            for name in names:
                wide = {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn)}
                wide["down_proj"] = (ffn, hidden)
                block = self.mlp if name in wide else self.attn
                block.add_module(name, nn.Linear(*wide.get(name, (hidden, hidden))))


def toy_slice(dim="in", channels=4, other=6, dtype=torch.float32):
    """Of the last channels of a projection of `Toy` whose FFN is 600 wide."""
    shape = (other, channels) if dim == "in" else (channels, other)
    index = torch.arange(600 - channels, 600, dtype=torch.int32)
    return Slice(dim, index, torch.randn(shape).to(dtype))


def toy_adapter(path, slices, **fields):
    write_adapter(path, slices, {"task_type": None, "base_model_name_or_path": "toy"} | fields)
    return path
