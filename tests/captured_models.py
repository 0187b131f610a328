"""Models to be trained by a captured step, and their twins by the loop written by hand."""

import copy

import recorded_ops
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn

from s2kernels import captured_step
from s2kernels.peft import S2FTConfig

LR = 2**-7  # the same number in fp32, which a captured rate is in
TARGETS = ["q_proj", "o_proj", "down_proj"]
METHODS = {
    "inplace": lambda: S2FTConfig(target_modules=TARGETS, heads=2, channels=6, mode="inplace"),
    "gather": lambda: S2FTConfig(target_modules=TARGETS, heads=2, channels=6, layout="gather"),
    "additive": lambda: S2FTConfig(target_modules=TARGETS, heads=2, channels=6, mode="additive"),
    "lora": lambda: LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="gaussian"),
    "full": lambda: None,
}


def record_steps(monkeypatch, device) -> None:
    """Steps are recorded, where there is no GPU by a stand-in."""
    if device.type != "cuda":
        monkeypatch.setattr(captured_step, "Recorder", recorded_ops.Recorder)
        monkeypatch.setattr(captured_step, "_obstacle", lambda model, params: None)


def prepared(method: str, device) -> tuple[nn.Module, nn.Module]:
    """A model under training, and its twin."""
    model = tiny_model("llama", torch.float32).to(device).train()
    config = METHODS[method]()
    if config is not None:
        model = get_peft_model(model, config)
    return model, copy.deepcopy(model)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, fused=True, capturable=True)


def batch(device, seed: int, length: int = 9) -> dict[str, torch.Tensor]:
    tokens = token_ids(3, length, seed).to(device)
    return {"input_ids": tokens, "labels": tokens}


def by_hand(model, optimizer, batch, max_norm=None) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    if max_norm is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    return loss.detach()


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    for (name, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, other), name
