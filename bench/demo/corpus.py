"""Text that every machine with Python has: the standard library, read as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def source_code() -> bytes:
    """The top-level modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"))
    if not modules:
        raise RuntimeError(f"the demo reads the sources of the standard library, none in {folder}")
    return b"\n".join(module.read_bytes() for module in modules)


def reference_text() -> bytes:
    """The English text behind `help("if")`: Python's language reference, in the order of topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "the demo reads pydoc_data/topics.py of the standard library, which this Python was "
            "packaged without (Debian: install the full python3 package, not python3-minimal)"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def as_tokens(text: bytes) -> Tensor:
    """One token a byte: uint8 (len(text),)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def split(tokens: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """(training part, last share `held_out`): a cut, so that no window lies in both."""
    cut = round(len(tokens) * (1 - held_out))
    return tokens[:cut], tokens[cut:]


def random_batch(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """`batch` windows at random places: int64 (batch, length)."""
    starts = torch.randint(len(tokens) - length + 1, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()
