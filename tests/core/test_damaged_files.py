"""Damaged adapter files are refused: none loads with other values and without an error."""

import json
import random
import shutil
import struct
import warnings

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from saved_adapters import CONFIG, TENSORS, edit_config, without_digests
from tiny_models import tiny_model, token_ids

import s2kernels.peft
from s2kernels import cli
from s2kernels.adapter import read_files, write_files
from s2kernels.digests import digests
from s2kernels.peft import S2FTConfig, SpIELConfig

CONFIGS = {
    "s2ft": S2FTConfig(heads=2, channels=3, seed=3, modules_to_save=["lm_head"]),
    "spiel": SpIELConfig(num_tunable_weights=60, seed=3),
}


def base():
    return tiny_model("llama", torch.float32, num_hidden_layers=2, vocab_size=48)


def saved(method, folder):
    """A model whose adapter, with random deltas, is saved in the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(base(), CONFIGS[method])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_delta" in name or "modules_to_save" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=CONFIGS)
def method(request):
    return request.param


@pytest.fixture
def folder(method, tmp_path):
    saved(method, tmp_path / "adapter")
    return tmp_path / "adapter"


def recorded(folder):
    return json.loads((folder / CONFIG).read_text())["digests"]


# Damage: each takes the folder and a source of random numbers.


def flip_bit(path, rng, start=0, stop=None):
    data = bytearray(path.read_bytes())
    data[rng.randrange(start, stop or len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def header_size(folder):
    return 8 + struct.unpack("<Q", (folder / TENSORS).read_bytes()[:8])[0]


def in_header(folder, rng):
    flip_bit(folder / TENSORS, rng, 0, header_size(folder))


def in_values(folder, rng):
    flip_bit(folder / TENSORS, rng, header_size(folder))


def in_config(folder, rng):
    flip_bit(folder / CONFIG, rng)


def byte_in_config(folder, rng):
    text = bytearray((folder / CONFIG).read_bytes())
    text[rng.randrange(len(text))] = rng.choice(b'0123456789abcdef_",:[]{} .nul')
    (folder / CONFIG).write_bytes(text)


def truncate(folder, rng):
    path = folder / rng.choice([TENSORS, CONFIG])
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def rewrite(folder, change):
    """Have `change` change the dictionary of tensors."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def drop(folder, rng):
    rewrite(folder, lambda tensors: tensors.pop(rng.choice(sorted(tensors))))


def rename(folder, rng):
    def change(tensors):
        name = rng.choice(sorted(tensors))
        at = rng.randrange(len(name))
        other = name[:at] + rng.choice("abcdefgklmopqrstu0123456789_.") + name[at + 1 :]
        tensors[other] = tensors.pop(name)

    rewrite(folder, change)


def swap(folder, rng):
    def change(tensors):
        one, other = rng.sample(sorted(tensors), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewrite(folder, change)


def drop_module(folder, rng):
    def change(tensors):
        module = rng.choice(sorted(tensors)).rpartition(".")[0]
        for name in [name for name in tensors if name.startswith(module + ".")]:
            del tensors[name]

    rewrite(folder, change)


DAMAGE = (in_header, in_values, in_config, byte_in_config)
DAMAGE += (truncate, drop, rename, swap, drop_module)
ALWAYS_SEEN = (in_values, drop, drop_module)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "num"), [("s2ft", 1000), ("spiel", 300)])
def test_no_mutant_loads_with_other_values_and_without_an_error(method, num, tmp_path):
    host = get_peft_model(base(), S2FTConfig(heads=1, channels=1))
    model = saved(method, tmp_path / "adapter")
    if method == "spiel":  # an adapter of the one method does not go into a model of the other
        host = get_peft_model(base(), SpIELConfig(num_tunable_weights=20))
    ids = token_ids()
    want = model.eval()(ids).logits
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    rng = random.Random(0)
    refused: dict[str, int] = {}
    harmless, silent = [], []
    for number in range(num):
        damage = DAMAGE[number % len(DAMAGE)]
        mutant = tmp_path / "mutant"
        shutil.copytree(tmp_path / "adapter", mutant)
        damage(mutant, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                host.load_adapter(mutant, "mutant")
        except Exception:
            refused[damage.__name__] = refused.get(damage.__name__, 0) + 1
        else:
            got = get_peft_model_state_dict(host, adapter_name="mutant")
            host.set_adapter("mutant")
            same = got.keys() == tensors.keys()
            same = same and all(torch.equal(got[name], tensors[name]) for name in tensors)
            same = same and torch.equal(host.eval()(ids).logits, want)
            host.set_adapter("default")
            (harmless if same else silent).append((number, damage.__name__))
        if "mutant" in host.peft_config:
            host.delete_adapter("mutant")
        shutil.rmtree(mutant)
    assert not silent
    each = num // len(DAMAGE)
    for damage in ALWAYS_SEEN:  # the test itself sees something
        assert refused[damage.__name__] >= each, damage.__name__
    assert harmless  # such as another seed of what is loaded anyway


# What has digests, and what is held to them


def test_every_writer_records_the_digests_of_what_it_wrote(method, folder, tmp_path):
    model = saved(method, tmp_path / "again")
    modules = CONFIGS[method].modules_to_save
    s2kernels.peft.save_pretrained(model, folder)
    assert recorded(folder) == digests(load_file(folder / TENSORS), modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_delta" in name:
                parameter.mul_(2)
    before = recorded(folder)
    model.save_pretrained(folder)  # over the first one
    assert recorded(folder) == digests(load_file(folder / TENSORS), modules) != before
    config, tensors = read_files(folder)
    if method == "s2ft":
        write_files(tmp_path / "written", config, {n: 2 * t for n, t in tensors.items()})
        written = load_file(tmp_path / "written" / TENSORS)
        assert recorded(tmp_path / "written") == digests(written, modules)


def test_a_configuration_that_is_saved_alone_has_no_digests(method, folder):
    """Its tensors may come later, as where transformers saves an adapter of its own."""
    config = PeftConfig.from_pretrained(folder)
    assert config.digests is not None
    config.save_pretrained(folder)
    assert recorded(folder) is None
    model = base()
    model.load_adapter(folder)
    model.save_pretrained(folder)
    assert recorded(folder) is None
    PeftModel.from_pretrained(base(), folder)


def test_an_adapter_without_digests_is_loaded(method, folder):
    want = PeftModel.from_pretrained(base(), folder)(token_ids()).logits
    without_digests(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(PeftModel.from_pretrained(base(), folder)(token_ids()).logits, want)
    read_files(folder)


@pytest.mark.parametrize("change", ["changed", "dropped", "renamed", "swapped"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_tensors_that_are_not_as_they_were_are_named(change, low_cpu_mem_usage, method, folder):
    tensors = load_file(folder / TENSORS)
    kind = "s2ft_delta" if method == "s2ft" else "spiel_delta"
    one, two = [name for name in sorted(tensors) if name.endswith(f"self_attn.o_proj.{kind}")]
    if change == "changed":
        tensors[one].view(-1)[0] += 1e-3
    elif change == "dropped":
        del tensors[one]
    elif change == "renamed":
        tensors[one.replace("o_proj", "o_pruj")] = tensors.pop(one)
    else:
        tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    name = one.removeprefix("base_model.model.").removesuffix(f".{kind}")
    if change == "renamed":
        name = name.replace("o_proj", "o_pruj")
    with pytest.raises(ValueError, match=name):
        PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors .* base_model\.model\."):
        read_files(folder)


def test_a_tensor_without_a_place_is_refused_without_digests_too(method, folder):
    without_digests(folder)
    rewrite(folder, lambda tensors: tensors.update(_renamed(tensors)))
    with pytest.raises(ValueError, match="no place for .*layers.7"):
        PeftModel.from_pretrained(base(), folder)


def _renamed(tensors):
    name = next(name for name in sorted(tensors) if "_delta" in name)
    return {name.replace("layers.0", "layers.7"): tensors[name].clone()}


def test_digests_hold_for_the_first_tensors_that_are_loaded_alone(method, folder):
    """Averages of adapters, or a checkpoint of the training that went on, are others."""
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    state = get_peft_model_state_dict(model)
    scaled = {n: 0.5 * t if "_delta" in n else t for n, t in state.items()}
    set_peft_model_state_dict(model, scaled)
    got = get_peft_model_state_dict(model)
    assert all(torch.equal(got[name], scaled[name]) for name in scaled)
    fresh = get_peft_model(base(), PeftConfig.from_pretrained(folder))
    fresh.save_pretrained(folder.parent / "fresh")
    set_peft_model_state_dict(fresh, scaled)
    assert torch.equal(fresh(token_ids()).logits, model.eval()(token_ids()).logits)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (CONFIG, b"{"),
        (CONFIG, b"\xff\xfe{}"),
        (CONFIG, b"[" * 100_000),
        (CONFIG, b"[]"),
        (TENSORS, b""),
        (TENSORS, b"\0" * 40),
    ],
)
def test_what_cannot_be_read_is_named(name, content, method, folder, capsys):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_files(folder)
    if name == CONFIG and content != b"[]":
        with pytest.raises(ValueError, match=name):
            type(CONFIGS[method]).from_pretrained(folder)
    for argv in (["inspect"], ["merge", "--output", str(folder / "merged"), "--base", str(folder)]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*argv, str(folder)])
        assert stop.value.code == 2 and name in capsys.readouterr().err


@pytest.mark.parametrize("value", [5, [], {"a": 1}, "text"])
def test_digests_that_are_none_are_refused(value, method, folder):
    edit_config(folder, digests=value)
    with pytest.raises(ValueError, match="digests"):
        PeftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{CONFIG}.*digests"):
        read_files(folder)
