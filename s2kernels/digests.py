"""Digests of an adapter's tensors, by which damage to its files is noticed.

They lie in adapter_config.json, as "digests": for each tensor of adapter_model.safetensors, by its
name there, a `digest`, and one of the names of the modules that are trained whole. The tensors' own
file is as it would be without them. An adapter that has none, as of earlier versions, is loaded
unchecked.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_MODULES = "modules_to_save"  # the one name in "digests" that is not that of a tensor


def digest(tensor: Tensor) -> str:
    """32 hexadecimal digits: BLAKE2b of dtype, shape and values, of 128 bits."""
    text = f"{tensor.dtype} {tuple(tensor.shape)}"
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    found = hashlib.blake2b(text.encode(), digest_size=16)
    found.update(values.numpy().data)
    return found.hexdigest()


def digests(tensors: Mapping[str, Tensor], modules_to_save: Iterable[str] | None) -> dict[str, str]:
    """The `digest` of each tensor and, where modules are trained whole, of their names."""
    found = {name: digest(tensor) for name, tensor in sorted(tensors.items())}
    if modules_to_save:
        found[_MODULES] = _digest_of_names(modules_to_save)
    return found


def check_modules(expected: Mapping[str, str], modules_to_save: Iterable[str] | None) -> None:
    """Raises ValueError where modules_to_save is not as it was saved: the tensors of a module that
    it does not name would be written into the base.
    """
    names = modules_to_save or ()
    if _MODULES in expected and expected[_MODULES] != _digest_of_names(names):
        raise ValueError(f"modules_to_save is not as it was saved, got {modules_to_save!r}")


def check_digests(where: Any, expected: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, which names `where` and the tensors, unless exactly those that `expected`
    names are there, and as they were saved.
    """
    missing, more = _compare(where, expected, tensors)
    _refuse(where, "not there", missing)
    _refuse(where, "not among what was saved", more)


def check_loaded(where: Any, expected: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """The same of tensors some of which go by other names than in the file, as PEFT maps those of
    other versions of a model: such ones need only have the digests of those that they stand for.
    """
    missing, more = _compare(where, expected, tensors)
    lost = Counter(missing.values()) - Counter(more.values())
    added = Counter(more.values()) - Counter(missing.values())
    _refuse(where, "not there", [name for name in missing if missing[name] in lost])
    _refuse(where, "not among what was saved", [name for name in more if more[name] in added])


def _compare(
    where: Any, expected: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, str]]:
    """The digests whose names have no tensor, and those of tensors whose names have none.

    Raises ValueError where one that goes by its name is another.
    """
    expected = {name: value for name, value in expected.items() if name != _MODULES}
    got = digests(tensors, None)
    changed = [name for name in expected if got.get(name, expected[name]) != expected[name]]
    _refuse(where, "not as it was saved", changed)
    return (
        {name: value for name, value in expected.items() if name not in got},
        {name: value for name, value in got.items() if name not in expected},
    )


def _refuse(where: Any, fault: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{where} is damaged or incomplete: {', '.join(found[:3])}{more}: {fault} "
            '(if it was changed on purpose, remove "digests" from adapter_config.json)'
        )


def _digest_of_names(names: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=16).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on CPU. Raises ValueError for a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def are_digests(value: Any) -> bool:
    """Whether it is what `digests` gives."""
    return isinstance(value, Mapping) and all(
        isinstance(part, str) for pair in value.items() for part in pair
    )
