"""S2FT adapters as LoRA adapters, exactly, for whatever loads those; and back.

A slice is a LoRA of which one factor is one-hot, with scaling 1. For R trained channels:

    dim="in"   lora_A (R, K) one-hot: it picks x[:, index]    lora_B (N, R) = delta
    dim="out"  lora_A (R, K) = delta                          lora_B (N, R) one-hot: it puts into y

All modules get one rank r, by rows and columns of zeros, and lora_alpha = r: there are servers that
know one rank and one scaling per adapter, or silently drop the patterns that say otherwise.

Slices of E experts become what PEFT calls target_parameters: lora_A (E * r, K), one expert after
the other, and lora_B (N, r * E), in whose columns the expert changes fastest.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2kernels.adapter import PREFIX, Slice, pack, read_files, split_tensors, write_files
from s2kernels.autograd.checks import check_choice
from s2kernels.coupling import base_layer
from s2kernels.lora_factors import to_expert_factors, to_factors, to_slice

FORMATS = ("peft", "vllm", "sglang")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # choices of its --max-lora-rank

# SGLang fuses these projections, and releases differ in which of a group they fill in themselves.
_SGLANG_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What both kinds of configuration have, and mean alike.
_COMMON_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "modules_to_save",
)


def export_lora(
    source: str | Path | nn.Module,
    out: str | Path,
    *,
    format: str = "peft",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | nn.Module | None = None,
) -> Path:
    """Write an S2FT adapter as a LoRA adapter into the folder `out`; returns `out`.

    source  the folder of an adapter, or a PEFT model whose one active adapter is taken
    format  who is to load it:
            "peft"    r is the largest number of channels that a module trains
            "vllm"    r is rounded up to a rank vLLM has; serve with --max-lora-rank r or more
            "sglang"  as "peft", and where some of q, k, v_proj or of gate, up_proj are trained, the
                      others of that block are there as zeros
    rank    r, where a larger one is wanted
    dtype   of the factors; by default that of each delta
    base    tells the widths of the modules, which no adapter holds: a model, or a path or name from
            which its configuration is read, but no weights. Default: the base that the adapter
            names.

    The LoRA is for the original, un-permuted base. Modules that were trained whole go along with
    "peft" and are refused for the others, which cannot load them; so are slices of experts. What
    was in `out` stays until the new files are complete.

    Raises ValueError for an unknown format, a source without one S2FT adapter, a rank that is too
    small or that the server does not have, more than 512 channels for vLLM, modules trained whole
    and experts for a server, and a base that is not known or does not have the adapter's modules.
    """
    check_choice("format", format, FORMATS)
    if isinstance(source, nn.Module):
        config, tensors, base = _read_model(source)
    else:
        config, tensors = read_files(source)
    if config.get("peft_type") != "S2FT":
        raise ValueError(f"{source} holds no S2FT adapter: it is {config.get('peft_type')!r}")
    slices, others = split_tensors(tensors, "the model" if source is base else str(source))
    if format != "peft" and (others or config.get("modules_to_save")):
        names = config.get("modules_to_save") or sorted(others)
        raise ValueError(
            f"{', '.join(names)} trained whole: format={format!r} cannot carry that; export with "
            "format='peft', or merge the adapter into the base model and serve that"
        )
    experts = {name: part for name, part in slices.items() if part.delta.dim() == 3}
    if format != "peft" and experts:
        raise ValueError(
            f"{next(iter(experts))} is a tensor of experts: format={format!r} cannot carry that; "
            "export with format='peft', or merge the adapter into the base model and serve that"
        )
    rank = _choose_rank(slices, format, rank)
    if not isinstance(base, nn.Module):
        base = _build_base(base or config.get("base_model_name_or_path"), config.get("revision"))

    keys = _nested_names(base, experts)
    factors, of_experts = {}, {}
    for name, part in experts.items():
        of_experts[keys[name]] = to_expert_factors(
            name, part, _expert_shape(base, name), rank, dtype
        )
    for name, part in slices.items():
        if name in experts:
            continue
        factors[name] = to_factors(name, part, _shape(base, name), rank, dtype)
    if format == "sglang":
        like = dtype or next(iter(slices.values())).delta.dtype
        for name in _absent_siblings(base, slices):
            num_out, num_in = _shape(base, name)
            factors[name] = (
                torch.zeros(rank, num_in, dtype=like, device="cpu"),
                torch.zeros(num_out, rank, dtype=like, device="cpu"),
            )
    lora_config = {field: config.get(field) for field in _COMMON_FIELDS} | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all([hasattr(base.get_submodule(name), "nf") for name in factors] or [0]),
        "inference_mode": True,
    }
    mistaken = _mistaken_for_experts(base, factors) if format == "peft" else []
    modules = {name: pair for name, pair in factors.items() if name not in mistaken}
    lora_config["target_modules"] = _target_modules(base, modules, format)
    if experts or mistaken:
        lora_config["target_parameters"] = sorted([*experts, *(f"{n}.weight" for n in mistaken)])
    for name, (lora_a, lora_b) in (factors | of_experts).items():
        others[f"{PREFIX}{name}.lora_A.weight"] = lora_a
        others[f"{PREFIX}{name}.lora_B.weight"] = lora_b
    write_files(out, lora_config, others)
    return Path(out)


def import_lora(path: str | Path, out: str | Path) -> Path:
    """Write the LoRA adapter in the folder `path` as an S2FT adapter into `out`; returns `out`.

    That is possible where every module is a slice: each row of lora_A, or else each column of
    lora_B, is zero or has a single 1. Zero padding goes, modules of which nothing is left go, and
    scaling is folded into delta, in fp32 or above where it is not 1. What `export_lora` wrote comes
    back bit for bit, but for fingerprints, which a LoRA does not hold, and for experts.

    Raises ValueError, naming the module, for a LoRA of another form, and for an adapter that is no
    plain LoRA.
    """
    config, tensors = read_files(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds no LoRA adapter: it is {config.get('peft_type')!r}")
    for field in ("use_dora", "lora_bias"):
        if config.get(field):
            raise ValueError(f"{path} is no plain LoRA: {field} is {config[field]!r}")
    parameters = config.get("target_parameters") or []
    if not all(name.endswith(".weight") for name in parameters):  # those are layers all the same
        raise ValueError(f"{path} is no plain LoRA: target_parameters is {parameters!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path} is no plain LoRA: bias is {config['bias']!r}")

    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        for factor in ("lora_A", "lora_B"):
            if key.endswith(f".{factor}.weight"):
                name = key.removeprefix(PREFIX).removesuffix(f".{factor}.weight")
                modules.setdefault(name, {})[factor] = tensor
                break
        else:
            others[key] = tensor
    strange = [key for key in others if "lora_" in key]
    if strange:
        raise ValueError(f"{path} is no plain LoRA: it holds {strange[0]}")

    slices = {}
    for name, factors in modules.items():
        part = to_slice(name, factors, config)
        if part is not None:
            slices[name] = part
    if not slices:
        raise ValueError(f"{path} trains nothing: no module has a factor other than zero")
    carried = {field: config.get(field) for field in _COMMON_FIELDS} | {"inference_mode": True}
    s2ft_config, saved = pack(slices, carried)
    write_files(out, s2ft_config, others | saved)
    return Path(out)


def _read_model(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """Configuration and tensors of a PEFT model's active adapter, as saved, and its base model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"source must be a folder or a PEFT model, got {type(model).__name__}")
    if len(model.active_adapters) != 1:
        raise ValueError(f"one active adapter wanted, got {model.active_adapters}: set_adapter one")
    name = model.active_adapters[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        config, tensors = read_files(Path(folder, "" if name == "default" else name))
    return config, tensors, model.get_base_model()


def _build_base(path: str | Path | None, revision: str | None) -> nn.Module:
    """The model that `path` describes, without values: only its shapes are wanted."""
    if not path:
        raise ValueError("the adapter does not name its base model: pass it, or its path, as base")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise ValueError(f"no configuration of the base model at {path}: {error}") from error
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        raise ValueError(f"{path} names no architecture of transformers: pass the model as base")
    with torch.device("meta"):
        return architecture(config)


def _shape(base: nn.Module, name: str) -> tuple[int, int]:
    """(N, K) of a module of the base."""
    try:
        module: Any = base.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the base model has no module {name}: it is another base") from None
    for fields in (("out_features", "in_features"), ("nf", "nx")):  # Linear and its kin, Conv1D
        if all(hasattr(module, field) for field in fields):
            return getattr(module, fields[0]), getattr(module, fields[1])
    raise ValueError(f"{name} must be a linear layer of the base, got {type(module).__name__}")


def _choose_rank(slices: Mapping[str, Slice], format: str, rank: int | None) -> int:
    """The rank of the export; raises ValueError where there is none."""
    largest, name = max((part.index.shape[-1], name) for name, part in slices.items())
    if format == "vllm" and largest > VLLM_RANKS[-1]:
        raise ValueError(
            f"{name} trains {largest} channels, and vLLM serves LoRA up to rank {VLLM_RANKS[-1]}: "
            "train fewer channels there, or merge the adapter into the base model and serve that"
        )
    if rank is None:
        return next(r for r in VLLM_RANKS if r >= largest) if format == "vllm" else largest
    if rank < largest:
        raise ValueError(f"rank must be at least {largest}, the channels of {name}, got {rank}")
    if format == "vllm" and rank not in VLLM_RANKS:
        raise ValueError(f"rank must be one that vLLM has, {VLLM_RANKS}, got {rank}")
    return rank


def _nested_names(base: nn.Module, experts: Mapping[str, Slice]) -> dict[str, str]:
    """The name under which PEFT saves a LoRA of each expert tensor: it wraps the module once for
    each of its parameters, in their order, and the last one lies outside.
    """
    names = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in experts):
        parameters = _parameters(base, module)
        trained = [leaf for leaf in parameters if f"{module}.{leaf}" in experts]
        for depth, leaf in enumerate(reversed(trained)):
            names[f"{module}.{leaf}"] = module + ".base_layer" * depth
    return names


def _mistaken_for_experts(base: nn.Module, names: Iterable[str]) -> list[str]:
    """The dense FFN layers of a Qwen3-MoE: as target_modules, PEFT takes their names for those that
    experts had in transformers 4. Named as parameters they are what they are.
    """
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    leaves = ("gate_proj", "up_proj", "down_proj")
    return [n for n in names if model_type == "qwen3_moe" and n.rpartition(".")[2] in leaves]


def _expert_shape(base: nn.Module, name: str) -> tuple[int, ...]:
    """(E, N, K) of a tensor of experts of the base."""
    module, _, leaf = name.rpartition(".")
    value = _parameters(base, module).get(leaf)
    if value is None or value.dim() != 3:
        raise ValueError(f"the base has no experts' tensor {name}: it is another base")
    return tuple(value.shape)


def _parameters(base: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What a module of the base, perhaps inside a tuner layer, has of its own."""
    try:
        module = base_layer(base, name)
    except AttributeError:
        raise ValueError(f"the base model has no module {name}: it is another base") from None
    return dict(module.named_parameters(recurse=False))


def _absent_siblings(base: nn.Module, slices: Mapping[str, Slice]) -> list[str]:
    """The modules that SGLang wants beside those trained."""
    absent: dict[str, None] = {}
    for name in slices:
        parent, _, child = name.rpartition(".")
        for group in _SGLANG_GROUPS:
            if child not in group:
                continue
            for sibling in group:
                full = f"{parent}.{sibling}" if parent else sibling
                if full not in slices and hasattr(base.get_submodule(parent), sibling):
                    absent[full] = None
    return list(absent)


def _target_modules(base: nn.Module, factors: Mapping[str, Any], format: str) -> list[str]:
    """Short names, which servers want; for PEFT full ones where the short ones match too much."""
    short = {name.rpartition(".")[2] for name in factors}
    matched = {n for n, _ in base.named_modules() if n.rpartition(".")[2] in short}
    return sorted(short if format != "peft" or matched == set(factors) else factors)
