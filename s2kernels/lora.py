"""S2FT adapters as LoRA adapters, exactly, for whatever loads those; and back.

A slice is a LoRA of which one factor is one-hot, with scaling 1. For R trained channels:

    dim="in"   lora_A (R, K) one-hot: it picks x[:, index]    lora_B (N, R) = delta
    dim="out"  lora_A (R, K) = delta                          lora_B (N, R) one-hot: it puts into y

All modules get one rank r, by rows and columns of zeros, and lora_alpha = r: there are servers that
know one rank and one scaling per adapter, or silently drop the patterns that say otherwise.
"""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2kernels.adapter import PREFIX, Slice, pack, read_files, split_tensors, write_files
from s2kernels.autograd.checks import check_choice

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
    "peft" and are refused for the others, which cannot load them. What was in `out` stays until the
    new files are complete.

    Raises ValueError for an unknown format, a source without one S2FT adapter, a rank that is too
    small or that the server does not have, more than 512 channels for vLLM, modules trained whole
    for a server, and a base that is not known or does not have the adapter's modules.
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
    rank = _choose_rank(slices, format, rank)
    if not isinstance(base, nn.Module):
        base = _build_base(base or config.get("base_model_name_or_path"), config.get("revision"))

    factors = {}
    for name, part in slices.items():
        factors[name] = _to_factors(name, part, _shape(base, name), rank, dtype)
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
        "fan_in_fan_out": all(hasattr(base.get_submodule(name), "nf") for name in factors),
        "inference_mode": True,
        "target_modules": _target_modules(base, factors, format),
    }
    for name, (lora_a, lora_b) in factors.items():
        others[f"{PREFIX}{name}.lora_A.weight"] = lora_a
        others[f"{PREFIX}{name}.lora_B.weight"] = lora_b
    write_files(out, lora_config, others)
    return Path(out)


def import_lora(path: str | Path, out: str | Path) -> Path:
    """Write the LoRA adapter in the folder `path` as an S2FT adapter into `out`; returns `out`.

    That is possible where every module is a slice: each row of lora_A, or else each column of
    lora_B, is zero or has a single 1. Zero padding goes, modules of which nothing is left go, and
    scaling is folded into delta, in fp32 or above where it is not 1. What `export_lora` wrote comes
    back bit for bit, but for fingerprints, which a LoRA does not hold.

    Raises ValueError, naming the module, for a LoRA of another form, and for an adapter that is no
    plain LoRA.
    """
    config, tensors = read_files(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds no LoRA adapter: it is {config.get('peft_type')!r}")
    for field in ("use_dora", "lora_bias", "target_parameters"):
        if config.get(field):
            raise ValueError(f"{path} is no plain LoRA: {field} is {config[field]!r}")
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
        part = _to_slice(name, factors, config)
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
    largest, name = max((len(part.index), name) for name, part in slices.items())
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


def _to_factors(
    name: str, part: Slice, shape: tuple[int, int], rank: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """lora_A (rank, K) and lora_B (N, rank) of one slice of a weight of shape (N, K)."""
    num_out, num_in = shape
    num = len(part.index)
    fits = num_out if part.dim == "in" else num_in, num_in if part.dim == "in" else num_out
    if part.delta.shape[1 - part.axis] != fits[0] or int(part.index.max()) >= fits[1]:
        raise ValueError(
            f"{name}: delta {tuple(part.delta.shape)} with {part.dim}put channels up to "
            f"{int(part.index.max())} does not fit the base's weight {shape}"
        )
    lora_a = torch.zeros(rank, num_in, dtype=dtype or part.delta.dtype, device="cpu")
    lora_b = torch.zeros(num_out, rank, dtype=dtype or part.delta.dtype, device="cpu")
    if part.dim == "in":
        lora_a[torch.arange(num, device="cpu"), part.index] = 1
        lora_b[:, :num] = part.delta
    else:
        lora_a[:num] = part.delta
        lora_b[part.index, torch.arange(num, device="cpu")] = 1
    return lora_a, lora_b


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


def _to_slice(name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Slice | None:
    """The slice that the factors of one module are, None where they come to nothing."""
    if len(factors) != 2:
        raise ValueError(f"{name}: lora_A or lora_B is missing")
    lora_a, lora_b = factors["lora_A"], factors["lora_B"]
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"{name}: lora_A (r, K) and lora_B (N, r) wanted, "
            f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    scaling = _scaling(name, lora_a.shape[0], config)
    for dim, selector, delta in (("in", lora_a, lora_b), ("out", lora_b.t(), lora_a.t())):
        rows = _one_hot_rows(selector)
        if rows is None or not len(rows):
            continue
        index = selector[rows].argmax(1).to(torch.int32)
        delta = delta[:, rows]
        if scaling != 1:
            delta = delta.to(torch.promote_types(delta.dtype, torch.float32)) * scaling
        try:
            return Slice(dim, index, (delta if dim == "in" else delta.t()).contiguous())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not lora_a.any() or not lora_b.any():
        return None
    raise ValueError(
        f"{name}: no slice of an S2FT adapter: neither every row of lora_A nor every column of "
        "lora_B is zero or has a single 1"
    )


def _one_hot_rows(selector: Tensor) -> Tensor | None:
    """The rows (r,) of a matrix that are not zero; None unless each of them has a single 1."""
    nonzero = selector != 0
    if (nonzero.sum(1) > 1).any() or (selector[nonzero] != 1).any():
        return None
    return nonzero.any(1).nonzero().flatten()


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies lora_B lora_A with in this module."""
    from peft.utils.other import get_pattern_key

    pattern: dict[str, float] = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(pattern), name)
    alpha: float = pattern[key] if key in pattern else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
