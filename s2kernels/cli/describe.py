"""`s2kernels inspect`: what an adapter trains, as its files say."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s2kernels.adapter import PREFIX, Slice, read_files, split_tensors

# What a report says of each layer, and how the total comes of it.
COLUMNS: dict[str, dict[str, Any]] = {
    "S2FT": dict(dim=None, channels=sum, heads=None, parameters=sum, bytes=sum, lora_rank=max),
    "SPIEL": dict(entries=sum, dtype=None, parameters=sum, bytes=sum),
}


def inspect(args: Namespace) -> None:
    """Print what an adapter trains; its files alone are read."""
    report = describe(args.adapter)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    columns = ["module", *COLUMNS[report["method"]]]
    rows = [[name.replace("_", " ") for name in columns]]
    for entry in (*report["layers"], report["total"]):
        rows.append([_text(entry[name]) for name in columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else value or "-"


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
    if method == "S2FT":
        slices, others = split_tensors(tensors, path)
        size = _head_dim(config.get("base_model_name_or_path"))
        layers = [{"module": name} | _of_slice(name, part, size) for name, part in slices.items()]
    elif method == "SPIEL":
        others = {key: tensor for key, tensor in tensors.items() if ".spiel_" not in key}
        layers = _of_entries(tensors, path)
    else:
        raise ValueError(f"{path} holds no adapter of S2FT or SpIEL: its type is {method!r}")
    blank = dict.fromkeys(COLUMNS[method])
    for name, tensor in others.items():
        layers.append({"module": name.removeprefix(PREFIX)} | blank | _sizes(tensor))
    total: dict[str, Any] = {"module": "total"}
    for name, of_all in COLUMNS[method].items():
        total[name] = of_all and of_all(layer[name] or 0 for layer in layers)
    return {"adapter": str(path), "method": method, "layers": layers, "total": total}


def _sizes(tensor: Tensor) -> dict[str, Any]:
    return {"parameters": tensor.numel(), "bytes": tensor.nbytes}


def _of_slice(name: str, part: Slice, head_dim: int | None) -> dict[str, Any]:
    num, heads = part.index.numel(), None
    if head_dim and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
        heads = sorted({int(channel) // head_dim for channel in part.index})
    whole = heads and len(heads) * (head_dim or 0) == num
    chosen = {"dim": part.dim, "channels": num, "heads": heads if whole else None}
    return chosen | _sizes(part.delta) | {"lora_rank": part.index.shape[-1]}


def _of_entries(tensors: Mapping[str, Tensor], path: Path) -> list[dict[str, Any]]:
    """What SpIEL trains; ValueError for a module whose delta or index is missing or too short."""
    layers = []
    for key in dict.fromkeys(key.partition(".spiel_")[0] for key in tensors if ".spiel_" in key):
        delta, index = (tensors.get(f"{key}.spiel_{field}") for field in ("delta", "index"))
        name = key.removeprefix(PREFIX)
        if delta is None or index is None or not delta.shape == index.shape == (len(delta),):
            raise ValueError(f"{path}: {name}: spiel_delta and spiel_index of one length wanted")
        dtype = str(delta.dtype).removeprefix("torch.")
        layers.append({"module": name, "entries": len(delta), "dtype": dtype} | _sizes(delta))
    if not layers:
        raise ValueError(f"{path} holds no SpIEL adapter: no tensor in it is called *.spiel_delta")
    return layers


def _head_dim(base: str | None) -> int | None:
    """Channels of a head, where the base is a folder whose configuration tells."""
    try:
        config = json.loads(Path(base or "", "config.json").read_text("utf-8"))
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, KeyError):
        return None
