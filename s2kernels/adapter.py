"""An S2FT adapter apart from any model: its slices, its files, its algebra and its fingerprint.

An adapter is one trained `Slice` per module, in the original basis; modules go by their names in
the base model, and so do the tensors of experts. On disk it is a folder as PEFT writes and reads
them:

    adapter_config.json        the configuration; peft_type is "S2FT"; see `s2kernels.digests`
    adapter_model.safetensors  for each module, after "base_model.model.":
        NAME.s2ft_delta        floating, (N, R) for dim="in", (R, K) for dim="out"
        NAME.s2ft_index        int32 (R,)
        NAME.s2ft_dim          int32 (), the axis of the weight: 1 for dim="in", 0 for dim="out"
        NAME.s2ft_fingerprint  int64 (R,), see `fingerprint`; 0 where it is not known

Tensors of E experts, (E, N, K), have all but s2ft_dim for each of them: delta (E, N, R) or
(E, R, K), index and fingerprint (E, R).

Nothing is pickled. Other tensors there may be are those of modules trained whole (modules_to_save).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from s2kernels.autograd.checks import DIMS, check_choice, check_floating, check_shape
from s2kernels.autograd.experts import check_positions
from s2kernels.digests import are_digests, check_digests, check_modules, digests, read_tensors
from s2kernels.files import replacing

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the name of a module

_FIELDS = ("delta", "index", "dim", "fingerprint")
# below it fp16 no longer holds every bf16 value
_NEGLIGIBLE = 2.0**-16


@dataclass(frozen=True, eq=False)
class Slice:
    """What an adapter trains of one weight (N, K), or of those of E experts, (E, N, K).

    dim          "in": R input channels, (N, R) of the weight; "out": R output channels, (R, K)
    index        int32 (R,), their positions in the original basis, in any order
    delta        what is added to the weight there: floating, (N, R) or (R, K)
    fingerprint  int64 (R,), of what the weight held there when the adapter was made, 0 for channels
                 of which it is not known; None if it is for none. See `fingerprint`.

    All three have an axis (E,) in front for experts, each of which trains channels of its own.

    Raises ValueError for another dim, a shape that does not fit, an index that is empty, negative
    or repeats a channel; TypeError for a wrong dtype.
    """

    dim: str
    index: Tensor
    delta: Tensor
    fingerprint: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("dim", self.dim, DIMS)
        check_floating(delta=self.delta)
        if self.delta.dim() not in (2, 3):
            raise ValueError(
                f"delta must be a matrix, or one for each expert, got shape "
                f"{tuple(self.delta.shape)}"
            )
        num = check_positions("index", self.index, torch.iinfo(torch.int32).max)
        shape = [*self.index.shape[:-1], *self.delta.shape[-2:]]
        shape[self.axis - 2] = num
        check_shape("delta", self.delta, *shape, why=f"index names {num} {self.dim}put channels")
        if self.fingerprint is not None:
            if self.fingerprint.dtype != torch.int64:
                raise TypeError(f"fingerprint must be int64, got {self.fingerprint.dtype}")
            check_shape("fingerprint", self.fingerprint, *self.index.shape, why="one per channel")

    @property
    def axis(self) -> int:
        """The axis of a weight (N, K) that the channels lie on; of delta, too, but for experts."""
        return 1 if self.dim == "in" else 0

    def of_expert(self, expert: int) -> "Slice":
        """The slice of one expert, a matrix."""
        prints = None if self.fingerprint is None else self.fingerprint[expert]
        return Slice(self.dim, self.index[expert], self.delta[expert], prints)


def read_adapter(path: str | Path) -> dict[str, Slice]:
    """The slices of the S2FT adapter in the folder `path`, by module, on CPU.

    Raises ValueError if there is no S2FT adapter, a file is damaged, or the tensors of a module are
    not complete or do not fit each other: the message names the folder and the module. So it does
    where modules were trained whole, which slices do not hold and would be lost without a word in
    what is made of them: `read_files` and `split_tensors` give both.
    """
    config, tensors = read_files(path)
    if config.get("peft_type") != "S2FT":
        raise ValueError(f"{path} holds no S2FT adapter: its type is {config.get('peft_type')!r}")
    slices, others = split_tensors(tensors, path)
    if others:
        names = ", ".join(sorted(name.removeprefix(PREFIX) for name in others))
        raise ValueError(
            f"{path} is more than slices: {names} trained whole (modules_to_save); read_files and "
            "split_tensors give both"
        )
    return slices


def write_adapter(path: str | Path, slices: Mapping[str, Slice], config: Mapping[str, Any]) -> None:
    """Write an adapter into the folder `path`, in the place of one that is there.

    config: the fields of an `S2FTConfig`, of which base_model_name_or_path and task_type matter to
    who loads it. peft_type, target_modules and indices are set from `slices`, whatever it says.

    An interruption leaves what was there: see `replacing`. Raises ValueError if slices is empty, or
    config names modules_to_save, of which there are no tensors here.
    """
    if config.get("modules_to_save"):
        raise ValueError(
            f"config must not name modules_to_save, got {config['modules_to_save']!r}: slices do "
            "not hold them; write_files takes their tensors along with those of pack"
        )
    write_files(path, *pack(slices, config))


def pack(
    slices: Mapping[str, Slice], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, as they are saved, of an adapter; see `write_adapter`."""
    if not slices:
        raise ValueError("slices must name at least one module, got none")
    tensors = {}
    for name, part in slices.items():
        prefix = f"{PREFIX}{name}.s2ft_"
        # cloned, as coupled modules may well share an index, which a file cannot
        tensors[prefix + "delta"] = part.delta.detach().clone()
        tensors[prefix + "index"] = part.index.clone()
        tensors[prefix + "dim"] = torch.tensor(part.axis, dtype=torch.int32)
        tensors[prefix + "fingerprint"] = _fingerprint_of(part).clone()
    derived = {
        "peft_type": "S2FT",
        "target_modules": sorted(slices),
        "indices": {name: part.index.tolist() for name, part in slices.items()},
    }
    return {**config, **derived}, tensors


def split_tensors(
    tensors: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Slice], dict[str, Tensor]]:
    """The slices among saved tensors, by module, and the tensors that belong to none.

    Raises ValueError, which names `path` and the module, for slices that are not well formed.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name, marker, field = key.rpartition(".s2ft_")
        if marker and field in _FIELDS:
            modules.setdefault(name.removeprefix(PREFIX), {})[field] = tensor
        else:
            others[key] = tensor
    if not modules:
        raise ValueError(f"{path} holds no S2FT adapter: no tensor in it is called *.s2ft_delta")
    slices = {}
    for name, fields in modules.items():
        try:
            slices[name] = _to_slice(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return slices, others


def combine(adapters: Sequence[Mapping[str, Slice]], weights: Sequence[float]) -> dict[str, Slice]:
    """The weighted sum of adapters of one base, exactly: the result trains the union of channels.

    Per module `delta = sum_i weights[i] * delta_i` over scattered deltas: a channel that several
    adapters train gets their sum, one that a single adapter trains its weighted delta. So
    `combine([a], [0.5])` scales and `combine([a, b], [1, -1])` subtracts. Summed in fp32, or in
    fp64 if a delta is; the index of the result is ascending. Channels keep their fingerprints.
    Where experts come to unions of different sizes, the smaller ones are filled up with channels
    whose delta is zero.

    Raises ValueError for no adapters, another number of weights, a weight that is not finite, and,
    naming the module, where adapters differ in dim, in the width of delta or in their base.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            "one weight per adapter wanted and at least one adapter, "
            f"got {len(adapters)} adapters and {len(weights)} weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    modules: dict[str, list[tuple[Slice, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, part in adapter.items():
            modules.setdefault(name, []).append((part, weight))
    return {name: _weighted_sum(name, parts) for name, parts in modules.items()}


def fingerprint(base_slice: Tensor, dim: str) -> Tensor:
    """What tells whether a base weight is the one an adapter was trained on: int64 (R,), on CPU.

    base_slice: what the weight holds at the trained channels, floating, shaped like delta and in
    the order of its index; of experts the answer is (E, R). Each channel gets 48 bits of the
    BLAKE2b hash of its values, rounded to bf16, with what is then smaller than 2**-16 taken as 0:
    so few that a sum of many adapters' does not overflow, whose average has it still; see `alike`.

    One number a channel, and not one for the slice, so that it follows its channel through
    `combine`, which reorders and unites channels. Rounded to bf16, because one checkpoint is
    trained in one dtype and loaded in another: a checkpoint in bf16, fp16 or fp32 has the same
    fingerprint in bf16, fp32 and fp64, and one in bf16 or fp16 has it in fp16, too: only values
    near 0 are lost there, hence the threshold. An fp32 checkpoint loaded in fp16 is not recognised,
    since it is rounded twice. A base that differs by less than the rounding passes: to a model in
    bf16 it is the same.

    Raises TypeError unless base_slice is floating, as that of a quantized weight is not; ValueError
    unless it holds values and is a matrix, or one for each expert.
    """
    check_choice("dim", dim, DIMS)
    check_floating(base_slice=base_slice)
    if base_slice.dim() not in (2, 3) or base_slice.is_meta:
        raise ValueError(
            "base_slice must be a matrix that holds values, or one for each expert, "
            f"got shape {tuple(base_slice.shape)} on {base_slice.device}"
        )
    channels = base_slice.detach() if dim == "out" else base_slice.detach().mT
    values = channels.to(torch.bfloat16)
    values = values.masked_fill(values.abs() < _NEGLIGIBLE, 0).contiguous().cpu()
    hashes = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        for row in values.flatten(0, -2).view(torch.int16).numpy()
    ]
    numbers = [(int.from_bytes(digest, "little", signed=True) >> 16) or 1 for digest in hashes]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").view(channels.shape[:-1])


def alike(left: Tensor, right: Tensor) -> Tensor:
    """Which channels' fingerprints, int64 (R,), stand for the same values, bool (R,).

    Averages of one number may be off by 2**-20 of it, as in fp32. Fingerprints of earlier versions
    have 16 bits more.
    """

    def close(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() - b.double()).abs() <= 2.0**-20 * b.double().abs()

    return close(left, right) | close(left >> 16, right) | close(left, right >> 16)


def check_fingerprint(name: str, expected: Tensor, base_slice: Tensor, dim: str) -> None:
    """Raises ValueError, naming the module, unless base_slice has the `fingerprint` expected.

    Channels of which that is 0, not known, pass. Of a base_slice in fp16 the message says that it
    may be the right base all the same, rounded from fp32.
    """
    got = fingerprint(base_slice, dim)
    check_shape(f"{name}: fingerprint", expected, *got.shape, why="one number per channel")
    expected = expected.cpu()
    different = int((~alike(got, expected) & (expected != 0)).sum())
    if different:
        hint = ""
        if base_slice.dtype == torch.float16:
            hint = (
                ", or, if it is an fp32 checkpoint loaded in fp16: load it in fp32, and convert it "
                "with .half() once the adapter is loaded"
            )
        raise ValueError(
            f"{name}: the adapter was trained on another base: {different} of {got.numel()} "
            "trained channels of the weight are not as they were; load the base that it was "
            f"trained on{hint}"
        )


def read_files(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, on CPU, of the PEFT adapter in the folder `path`.

    Raises ValueError, which names the file, if one of the two is missing or damaged; with the
    tensors' names where they are not those that were saved, of which the configuration has digests.
    """
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not Path(path, name).is_file():
            raise ValueError(f"{path} holds no adapter: there is no {name}")
    try:
        config = json.loads(Path(path, CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{Path(path, CONFIG_NAME)} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{Path(path, CONFIG_NAME)} is damaged: it holds no JSON object")
    tensors = read_tensors(Path(path, TENSORS_NAME))
    if (expected := config.get("digests")) is not None:
        try:
            if not are_digests(expected):
                raise ValueError("digests must be texts by the names of tensors")
            check_modules(expected, config.get("modules_to_save"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{Path(path, CONFIG_NAME)} is damaged: {error}") from None
        check_digests(Path(path, TENSORS_NAME), expected, tensors)
    return config, tensors


def write_files(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of a PEFT adapter into the folder `path`; see `replacing`.

    The configuration of S2FT gets the digests of the tensors. Raises OSError where the files cannot
    be written, as on a full disk.
    """
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if config.get("peft_type") == "S2FT":
        config = {**config, "digests": digests(dense, config.get("modules_to_save"))}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets become lists
    with replacing(path) as folder:
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        try:
            save_file(dense, folder / TENSORS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{Path(path, TENSORS_NAME)} cannot be written: {error}") from error


def _to_slice(fields: Mapping[str, Tensor]) -> Slice:
    """A slice from the tensors saved for it, by field."""
    missing = [f"s2ft_{field}" for field in ("delta", "index", "dim") if field not in fields]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    dim = fields["dim"]
    if dim.numel() != 1 or dim.item() not in (0, 1):
        raise ValueError(f"s2ft_dim must be 0 or 1, got {dim.tolist()}")
    prints = fields.get("fingerprint")
    if prints is not None and not prints.any():
        prints = None
    return Slice("in" if dim.item() == 1 else "out", fields["index"], fields["delta"], prints)


def _weighted_sum(name: str, parts: list[tuple[Slice, float]]) -> Slice:
    """`combine` for one module."""
    first = parts[0][0]
    if len({part.index.shape[:-1] for part, _ in parts}) > 1:
        raise ValueError(f"{name}: the adapters are of different models, in the number of experts")
    if first.delta.dim() == 3:
        of_each = [
            _weighted_sum(name, [(part.of_expert(expert), weight) for part, weight in parts])
            for expert in range(len(first.delta))
        ]
        return _stacked(of_each)
    if any(part.dim != first.dim for part, _ in parts):
        raise ValueError(f"{name}: one adapter trains input channels, another output channels")
    widths = [part.delta.shape[1 - part.axis] for part, _ in parts]
    if len(set(widths)) > 1:
        raise ValueError(f"{name}: the adapters are of different models, their widths are {widths}")
    dtype = reduce(torch.promote_types, [part.delta.dtype for part, _ in parts], torch.float32)
    index, where = torch.cat([part.index for part, _ in parts]).unique(return_inverse=True)
    shape = (widths[0], len(index)) if first.dim == "in" else (len(index), widths[0])
    delta = torch.zeros(shape, dtype=dtype, device=first.delta.device)
    pieces = where.split([len(part.index) for part, _ in parts])
    for (part, weight), piece in zip(parts, pieces, strict=True):
        delta.index_add_(first.axis, piece, weight * part.delta.detach().to(dtype))

    given = torch.cat([_fingerprint_of(part) for part, _ in parts])
    known = given != 0
    united = torch.zeros(len(index), dtype=torch.int64, device=index.device)
    united[where[known]] = given[known]
    if not alike(united[where[known]], given[known]).all():
        raise ValueError(f"{name}: the adapters were trained on different bases")
    return Slice(first.dim, index, delta, united if known.any() else None)


def _stacked(parts: Sequence[Slice]) -> Slice:
    """The slices of all experts as one, with as many channels for each as the largest has."""
    num = max(len(part.index) for part in parts)
    indices, deltas, prints = [], [], []
    for part in parts:
        # There are enough: of the first `num` channels a smaller index names at most its length.
        free = torch.ones(num, dtype=torch.bool, device=part.index.device)
        free[part.index[part.index < num].long()] = False
        more = free.nonzero().flatten()[: num - len(part.index)]
        index, order = torch.cat([part.index, more.to(torch.int32)]).sort()
        pad = (0, len(more)) if part.dim == "in" else (0, 0, 0, len(more))
        indices.append(index)
        deltas.append(torch.nn.functional.pad(part.delta, pad).index_select(part.axis, order))
        prints.append(torch.nn.functional.pad(_fingerprint_of(part), (0, len(more)))[order])
    fingerprint = torch.stack(prints)
    return Slice(
        parts[0].dim,
        torch.stack(indices),
        torch.stack(deltas),
        fingerprint if fingerprint.any() else None,
    )


def _fingerprint_of(part: Slice) -> Tensor:
    """int64 like the index, 0 where it is not known."""
    if part.fingerprint is None:
        return torch.zeros_like(part.index, dtype=torch.int64)
    return part.fingerprint
