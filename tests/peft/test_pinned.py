"""What a user of the tuners relies on, pinned: signatures, adapter files, saved bytes, numbers.

`python tests/peft/test_pinned.py` writes what it finds into pinned.json. A difference there is a
change that users see, and belongs into the message of its commit.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

import s2kernels.peft
from s2kernels.peft import S2FTConfig, SpIELConfig

PATH = Path(__file__).with_name("pinned.json")
WIDE = dict(intermediate_size=192, moe_intermediate_size=192)  # blocks of 64 channels
CASES = {
    "s2ft-inplace": S2FTConfig(heads=2, channels=64, seed=3, mode="inplace"),
    "s2ft-additive": S2FTConfig(heads=2, channels=64, seed=3, mode="additive"),
    "s2ft-unfused": S2FTConfig(heads=2, channels=64, seed=3, fuse=False),
    "s2ft-block": S2FTConfig(heads=2, channels=64, seed=3, layout="block"),
    "s2ft-permute": S2FTConfig(heads=2, channels=64, seed=3, layout="permute"),
    "s2ft-all-linear": S2FTConfig(heads=3, channels=7, seed=3, target_modules="all-linear"),
    "s2ft-mixtral": S2FTConfig(heads=2, channels=9, seed=3),
    "spiel-inplace": SpIELConfig(num_tunable_weights=1500, seed=3, mode="inplace"),
    "spiel-additive": SpIELConfig(num_tunable_weights=1500, seed=3, mode="additive"),
    "spiel-momentum": SpIELConfig(
        density=0.02, seed=3, selection="momentum_approximation", delta_dtype="bfloat16"
    ),
}


def signatures() -> dict[str, str]:
    found = {}
    for name in s2kernels.peft.__all__:
        value = getattr(s2kernels.peft, name)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                found[f"{name}.{field.name}"] = f"{field.type} = {field.default!r}"
        elif name.endswith(("Tuner", "Callback")) or inspect.isfunction(value):
            found[name] = str(inspect.signature(value))
    # Where a class is defined may change, its public name may not.
    own_module = re.compile(r"s2kernels\.peft\.[a-z0-9_.]+\.")
    return {
        name: own_module.sub("", text).replace(str(dataclasses.MISSING), "MISSING")
        for name, text in found.items()
    }


class SavedBytes:
    """Bytes of the storages that are saved for the backward and are not parameters or buffers."""

    def __init__(self, model) -> None:
        self.own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return x


def measured(name: str) -> dict:
    """Everything that is pinned of one case."""
    config = dataclasses.replace(CASES[name])
    model = tiny_model("mixtral" if "mixtral" in name else "llama", **WIDE).train()
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder, "adapter_model.safetensors").read_bytes()
        saved = json.loads(Path(folder, "adapter_config.json").read_text())
    generator = torch.Generator().manual_seed(5)
    deltas = {n: p for n, p in model.named_parameters() if "_delta" in n}
    with torch.no_grad():
        for delta in deltas.values():
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.copy_(0.3 * noise)
    ids = token_ids(batch=3)
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    saving = SavedBytes(model)
    with saving.hooks:
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return {
        "file": hashlib.sha256(file).hexdigest(),
        "config": {  # PEFT writes the names of a set in any order
            key: sorted(value) if isinstance(value, list) else value
            for key, value in saved.items()
            if key != "peft_version"
        },
        "saved_bytes": sum(saving.sizes.values()),
        "loss": output.loss.item(),
        "logits": output.logits.abs().sum().item(),
        "gradients": {n: p.grad.double().abs().sum().item() for n, p in deltas.items()},
    }


def found() -> dict:
    return {"signatures": signatures(), "cases": {name: measured(name) for name in CASES}}


@pytest.fixture(scope="module")
def pinned():
    return json.loads(PATH.read_text())


def test_public_signatures(pinned):
    assert signatures() == pinned["signatures"]


@pytest.mark.parametrize("name", CASES)
def test_files_bytes_and_numbers(name, pinned):
    got, want = measured(name), pinned["cases"][name]
    for key in ("file", "config", "saved_bytes"):
        assert got[key] == want[key], key
    exact = 1e-11 if "momentum" not in name else 1e-2  # bf16 deltas
    for key in ("loss", "logits", "gradients"):
        assert got[key] == pytest.approx(want[key], rel=exact), key


if __name__ == "__main__":
    PATH.write_text(json.dumps(found(), indent=1, sort_keys=True) + "\n")
    print(f"{PATH} written", file=sys.stderr)
