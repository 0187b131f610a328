"""How deep a backward goes: below the first trained layer nothing has a gradient to wait for.

With o_proj and down_proj trained, block 0 needs d_delta of its o_proj and no more: no dx of o_proj,
no backward of its attention, no dx of q, k and v, nothing at the embedding. What asks for more is
transformers' enable_input_require_grads, which checkpoints of the reentrant kind alone need.
"""

import inspect

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny_models import tiny_model, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from s2kernels.peft import S2FTConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NOT_REENTRANT = {"use_reentrant": False}


class Depth(TorchDispatchMode):
    """Of what projections a dx is computed, (block, name), and for how many attentions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        blocks = model.get_base_model().model.layers
        self.weights = {
            (i, name): block.get_submodule(f"self_attn.{name}").weight
            for i, block in enumerate(blocks)
            for name in PROJECTIONS
        }
        self.dx: set[tuple[int, str]] = set()
        self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.attentions += "attention" in name and name.endswith("_backward")
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            # dy W has W as it lies in memory, where x Wᵀ has a transposed view
            factors = [x for x in tree_leaves(args)[-2:] if isinstance(x, Tensor)]
            for factor in factors:
                if factor.stride(-1) == 1:
                    self.dx |= {key for key, w in self.weights.items() if _overlap(factor, w)}
        return func(*args, **(kwargs or {}))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether they share memory: joined weights are parts of one."""
    first, last = ((x.data_ptr(), x.data_ptr() + x.nbytes) for x in (a, b))
    return first[0] < last[1] and last[0] < first[1]


ABOVE = {(1, name) for name in PROJECTIONS}
ALL = ABOVE | {(0, name) for name in PROJECTIONS}


def trained_model(targets=("o_proj", "down_proj"), mode="inplace", prepare=lambda model: model):
    torch.manual_seed(0)
    # square weights would not tell W from its transpose
    model = prepare(tiny_model("llama", torch.float32, head_dim=6).train())
    config = S2FTConfig(target_modules=list(targets), heads=2, channels=6, mode=mode)
    return get_peft_model(model, config)


def depth(model) -> tuple[set[tuple[int, str]], int]:
    """Of one forward and backward. Every delta gets a gradient."""
    ids = token_ids()
    with Depth(model) as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), name
    return seen.dx, seen.attentions


@pytest.mark.parametrize("mode", ["inplace", "additive"])
def test_no_dx_below_the_first_trained_layer(mode):
    assert depth(trained_model(mode=mode)) == (ABOVE, 1)


def test_first_trained_layer_is_lower_down():
    """With v_proj trained attention has a backward; q and k still have no dx in block 0."""
    dx, attentions = depth(trained_model(targets=["v_proj", "down_proj"]))
    assert (dx, attentions) == (ABOVE | {(0, "o_proj")}, 2)


def test_checkpointing_of_torch():
    """Non-reentrant checkpoints do not ask for more, but transformers does on their behalf."""
    model = trained_model()
    model.get_base_model().activation_checkpointing_enable(NOT_REENTRANT)
    assert depth(model) == (ALL, 2)
    model.disable_input_require_grads()
    assert depth(model) == (ABOVE, 1)


def enabled(model: nn.Module) -> nn.Module:
    model.enable_input_require_grads()
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model.activation_checkpointing_enable(NOT_REENTRANT)
    return model


def quantized(model: nn.Module, **arguments) -> nn.Module:
    """Prepared as if it were: nothing is done to others."""
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=NOT_REENTRANT, **arguments)
    model.is_loaded_in_4bit = False
    return model


# what makes dx go down to the embedding, before the adapter is made
LOSERS = {
    "enable_input_require_grads": enabled,
    "checkpointing": checkpointed,
    "kbit": quantized,
}


@pytest.mark.parametrize("prepare", LOSERS)
def test_what_loses_it(prepare):
    assert depth(trained_model(prepare=LOSERS[prepare])) == (ALL, 2)


def test_quantized_base_keeps_it():
    """Checkpointing comes after the adapter: PEFT asks for the gradient of a model that has it."""
    model = trained_model(prepare=lambda model: quantized(model, use_gradient_checkpointing=False))
    assert depth(model) == (ABOVE, 1)
    model.get_base_model().activation_checkpointing_enable(NOT_REENTRANT)
    model.disable_input_require_grads()
    assert depth(model) == (ABOVE, 1)


def test_reentrant_checkpointing_needs_it():
    """Without the gradient at its input a reentrant checkpoint has no backward at all."""
    model = trained_model()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    assert depth(model) == (ALL, 2)
    model.disable_input_require_grads()
    model.zero_grad()
    ids = token_ids()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


def trained_by_trainer(model, tmp_path, **arguments) -> tuple[set[tuple[int, str]], int]:
    ids = token_ids()
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    with Depth(model) as seen:
        trainer.train()
    return seen.dx, seen.attentions


@pytest.mark.parametrize("by", ["argument", "model"])
def test_trainer(by, tmp_path):
    """Asked for by its argument checkpointing loses it; enabled on the model it need not."""
    model = trained_model()
    arguments = {}
    if by == "argument":
        named = inspect.signature(TrainingArguments).parameters
        new = "activation_checkpointing" in named
        arguments["activation_checkpointing" if new else "gradient_checkpointing"] = True
    else:
        model.get_base_model().activation_checkpointing_enable(NOT_REENTRANT)
        model.disable_input_require_grads()
    expected = (ALL, 2) if by == "argument" else (ABOVE, 1)
    assert trained_by_trainer(model, tmp_path, **arguments) == expected
