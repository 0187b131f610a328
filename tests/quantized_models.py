"""Tiny models whose linear layers are quantized on the CPU, by bitsandbytes and torchao."""

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from tiny_models import tiny_model
from torch import Tensor, nn

KINDS = ("nf4", "nf4 double", "int8", "torchao int8")
WIDE = dict(hidden_size=64, intermediate_size=128)  # whole blocks of NF4


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose linear layers, but the head, are quantized on the CPU."""
    model = tiny_model("llama", dtype, **WIDE)
    if kind == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization")
        wanted = lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"  # noqa: E731
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=wanted)
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        shape = module.in_features, module.out_features
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*shape, compute_dtype=dtype)
            new.weight = bnb.nn.Params4bit(
                module.weight.data, quant_type="nf4", compress_statistics=kind == "nf4 double"
            )
        new.weight.requires_grad_(False)
        new.bias = module.bias
        model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_8bit = kind == "int8"
    model.is_loaded_in_4bit = kind != "int8"
    return model


def dequantized(layer: nn.Module) -> Tensor:
    """A copy of the dense weight that the base layer of a tuner layer stands for."""
    return dequantize_module_weight(layer.get_base_layer()).clone()
