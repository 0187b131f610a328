"""What an adapter trains, as its files say, for `s2kernels inspect`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from s2kernels.adapter import PREFIX, Slice, read_files, split_tensors

# what the layers of a report have, and its table shows
COLUMNS = {
    "S2FT": ("module", "dim", "channels", "heads", "parameters", "bytes", "lora_rank"),
    "SPIEL": ("module", "entries", "dtype", "parameters", "bytes"),
}


def describe(path: Path) -> dict[str, Any]:
    """What the adapter in a folder trains: a dict for each module, and the totals.

    A module has the fields of COLUMNS for its method; None is what does not apply. Of modules that
    were trained whole, those in modules_to_save, each tensor is listed.

    heads      None unless the configuration of the base is at hand and the channels are whole heads
    bytes      of what is trained; positions are left out
    lora_rank  the rank of the LoRA that equals the slice: its number of channels, of experts that
               of each

    Raises ValueError unless it is an adapter of S2FT or SpIEL that is whole.
    """
    config, tensors = read_files(path)
    method = config.get("peft_type")
    layers: list[dict[str, Any]] = []
    if method == "S2FT":
        slices, others = split_tensors(tensors, path)
        size = _head_dim(config.get("base_model_name_or_path"))
        layers = [_of_slice(name, part, size) for name, part in slices.items()]
    elif method == "SPIEL":
        deltas, others = _split_entries(tensors, path)
        layers = [_of_entries(name, delta) for name, delta in deltas.items()]
    else:
        raise ValueError(f"{path} holds no adapter of S2FT or SpIEL: its type is {method!r}")
    blank: dict[str, Any] = dict.fromkeys(COLUMNS[method])
    for name, tensor in others.items():
        layers.append(blank | _sizes(tensor) | {"module": name.removeprefix(PREFIX)})
    total = blank | {"module": "total"}
    for name in {"channels", "entries", "parameters", "bytes"} & blank.keys():
        total[name] = sum(entry[name] or 0 for entry in layers)
    if "lora_rank" in blank:
        total["lora_rank"] = max(entry["lora_rank"] or 0 for entry in layers)
    return {"adapter": str(path), "method": method, "layers": layers, "total": total}


def _sizes(tensor: Tensor) -> dict[str, Any]:
    return {"parameters": tensor.numel(), "bytes": tensor.nbytes}


def _of_slice(name: str, part: Slice, head_dim: int | None) -> dict[str, Any]:
    num, heads = part.index.numel(), None
    if head_dim and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
        heads = sorted({int(channel) // head_dim for channel in part.index})
    return {
        "module": name,
        "dim": part.dim,
        "channels": num,
        "heads": heads if heads and len(heads) * (head_dim or 0) == num else None,
        **_sizes(part.delta),
        "lora_rank": part.index.shape[-1],
    }


def _of_entries(name: str, delta: Tensor) -> dict[str, Any]:
    dtype = str(delta.dtype).removeprefix("torch.")
    return {"module": name, "entries": len(delta), "dtype": dtype, **_sizes(delta)}


def _split_entries(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The deltas (k,) of a SpIEL adapter by module, and the tensors that belong to none.

    Raises ValueError for a module whose delta or index is missing, or of different lengths.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name, marker, field = key.rpartition(".spiel_")
        if marker:
            modules.setdefault(name.removeprefix(PREFIX), {})[field] = tensor
        else:
            others[key] = tensor
    if not modules:
        raise ValueError(f"{path} holds no SpIEL adapter: no tensor in it is called *.spiel_delta")
    for name, fields in modules.items():
        shapes = [tuple(fields[field].shape) for field in ("delta", "index") if field in fields]
        if len(shapes) < 2 or shapes[0] != shapes[1] or len(shapes[0]) != 1:
            raise ValueError(
                f"{path}: {name}: spiel_delta and spiel_index of one length wanted, got {shapes}"
            )
    return {name: fields["delta"] for name, fields in modules.items()}, others


def _head_dim(base: str | None) -> int | None:
    """Channels of a head, where the base is a folder whose configuration tells."""
    try:
        config = json.loads(Path(base or "", "config.json").read_text("utf-8"))
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, KeyError):
        return None
