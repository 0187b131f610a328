"""What vLLM and SGLang ask of a LoRA: ranks, whole groups of modules, none trained whole."""

import pytest
import torch
from lora_cases import WIDE, Toy, dense, lora_of, s2ft_model, toy_adapter, toy_slice
from peft import PeftModel
from tiny_models import tiny_model, token_ids

from s2kernels.adapter import read_files
from s2kernels.lora import VLLM_RANKS, export_lora, import_lora

VLLM = [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 320)]
VLLM += [(320, 320), (321, 512), (512, 512)]


@pytest.mark.parametrize(("channels", "rank"), VLLM)
def test_vllm_gets_a_rank_it_has(channels, rank, tmp_path):
    slices = {"mlp.down_proj": toy_slice(channels=channels), "mlp.up_proj": toy_slice("out", 1)}
    source = toy_adapter(tmp_path / "s2ft", slices)
    out = export_lora(source, tmp_path / "lora", format="vllm", base=Toy())
    factors, config = lora_of(out)
    assert config["r"] == config["lora_alpha"] == rank and rank in VLLM_RANKS
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert factors.keys() == slices.keys()
    for name, part in slices.items():
        lora_a, lora_b = factors[name]
        assert lora_a.shape[0] == lora_b.shape[1] == rank
        shape = (lora_b.shape[0], lora_a.shape[1])
        assert torch.equal(lora_b @ lora_a, dense(part, shape))
    config = read_files(export_lora(source, tmp_path / "peft", base=Toy()))[0]
    assert config["r"] == config["lora_alpha"] == channels


RANKS = [
    ("vllm", 513, None, r"mlp\.down_proj trains 513 channels, and vLLM .* 512: train fewer"),
    ("vllm", 513, 600, "trains 513 channels"),
    ("vllm", 9, 12, r"rank must be one that vLLM has, .*, got 12"),
    ("vllm", 9, 8, r"rank must be at least 9, the channels of mlp\.down_proj, got 8"),
    ("peft", 9, 8, "rank must be at least 9"),
    ("sglang", 9, 0, "rank must be at least 9"),
    ("tgi", 9, None, "format must be one of 'peft', 'vllm', 'sglang', got 'tgi'"),
]


@pytest.mark.parametrize(("format", "channels", "rank", "message"), RANKS)
def test_a_rank_that_cannot_be_is_refused(format, channels, rank, message, tmp_path):
    source = toy_adapter(tmp_path / "s2ft", {"mlp.down_proj": toy_slice(channels=channels)})
    with pytest.raises(ValueError, match=message):
        export_lora(source, tmp_path / "lora", format=format, rank=rank, base=Toy())
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("format", "rank"), [("peft", 600), ("vllm", 64), ("sglang", 13)])
def test_a_larger_rank_is_zeros(format, rank, tmp_path):
    part = toy_slice(channels=9)
    source = toy_adapter(tmp_path / "s2ft", {"mlp.down_proj": part})
    out = export_lora(source, tmp_path / "lora", format=format, rank=rank, base=Toy())
    factors, config = lora_of(out)
    lora_a, lora_b = factors["mlp.down_proj"]
    assert config["r"] == config["lora_alpha"] == rank == len(lora_a)
    assert torch.equal(lora_b @ lora_a, dense(part, (6, 600)))


SIBLINGS = [
    (["attn.v_proj"], {"attn.q_proj", "attn.k_proj"}),
    (["attn.k_proj", "mlp.up_proj"], {"attn.q_proj", "attn.v_proj", "mlp.gate_proj"}),
    (["attn.q_proj", "mlp.gate_proj"], {"attn.k_proj", "attn.v_proj", "mlp.up_proj"}),
    (["attn.q_proj", "attn.k_proj", "attn.v_proj"], set()),
    (["attn.o_proj", "mlp.down_proj"], set()),
]


@pytest.mark.parametrize(("trained", "wanted"), SIBLINGS)
def test_sglang_gets_whole_groups(trained, wanted, tmp_path):
    base = Toy(hidden=600)
    slices = {}
    for name in trained:
        dim = "in" if name in ("attn.o_proj", "mlp.down_proj") else "out"
        slices[name] = toy_slice(dim, channels=3 if name == trained[0] else 4, other=600)
    source = toy_adapter(tmp_path / "s2ft", slices)
    factors, config = lora_of(export_lora(source, tmp_path / "lora", format="sglang", base=base))
    assert factors.keys() == set(trained) | wanted
    names = {name.rpartition(".")[2] for name in factors}
    assert config["target_modules"] == sorted(names)
    for name, (lora_a, lora_b) in factors.items():
        assert len(lora_a) == lora_b.shape[1] == config["r"] == max(map(len_of, slices.values()))
        layer = base.get_submodule(name)
        shape = (layer.out_features, layer.in_features)
        want = torch.zeros(shape) if name in wanted else dense(slices[name], shape)
        assert torch.equal(lora_b @ lora_a, want)
        assert lora_a.any() == (name in trained)
    for format in ("peft", "vllm"):
        out = export_lora(source, tmp_path / format, format=format, base=base)
        assert lora_of(out)[0].keys() == set(trained)


def test_sglang_zeros_only_for_modules_that_the_base_has(tmp_path):
    source = toy_adapter(tmp_path / "s2ft", {"mlp.up_proj": toy_slice("out")})
    base = Toy(names=["up_proj", "down_proj"])  # an FFN without a gate
    out = export_lora(source, tmp_path / "lora", format="sglang", base=base)
    assert lora_of(out)[0].keys() == {"mlp.up_proj"}


def len_of(part):
    return len(part.index)


def test_modules_trained_whole_go_to_peft_and_to_no_server(tmp_path):
    model = s2ft_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    want = model(token_ids()).logits
    out = export_lora(model, tmp_path / "peft")
    assert read_files(out)[0]["modules_to_save"] == ["lm_head"]
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32, **WIDE), out)
    assert (loaded(token_ids()).logits - want).abs().max() <= 1e-6
    for format in ("vllm", "sglang"):
        with pytest.raises(ValueError, match=f"lm_head trained whole: format='{format}' cannot"):
            export_lora(model, tmp_path / format, format=format)

    back = import_lora(out, tmp_path / "back")
    config, tensors = read_files(back)
    assert config["modules_to_save"] == ["lm_head"]
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(tensors["base_model.model.lm_head.weight"], head.weight)
