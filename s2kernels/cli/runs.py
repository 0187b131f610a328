"""The folder of a run of `s2kernels finetune`: its options and its checkpoints."""

import hashlib
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

OPTIONS_NAME = "options.json"
BASE_NAME = "base"  # the folder of the random model of --config

# What decides which heads and channels are trained, where no --selection does.
CHOICE = "heads channels granularity strategy smallest scope calibration_share".split()

# Options on which the result depends: a run is resumed with the same ones or not at all. The
# number of steps is not among them, so that a run can be prolonged.
_LASTING = (
    f"model config tokenizer {' '.join(CHOICE)} targets seed lr batch_size accumulate max_length "
    "warmup bf16 packing held_out layout"
).split()
_FREE = "mode gradient_checkpointing epochs max_steps".split()


def settle_choice(args: Namespace) -> None:
    """Put the defaults in the place of those of CHOICE that were not given, which are None.

    With --selection they stay None. Raises ValueError if one of them was given along with it.
    """
    given = [name for name in CHOICE if getattr(args, name) is not None]
    if args.selection is None:
        for name in set(CHOICE) - set(given):
            setattr(args, name, args.defaults[name])
    elif given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"--selection says which heads and channels to train, {option} cannot")


def check_new(output: Path) -> None:
    """Raises ValueError unless a run can begin in this folder: one that does not exist or is empty,
    or where a run has ended before its first checkpoint.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = {name for name in names if not name.startswith(("checkpoint-", ".writing-"))}
    began = others <= {OPTIONS_NAME, BASE_NAME} and _is_ours(output / OPTIONS_NAME)
    if not began or last_checkpoint(output):
        raise ValueError(f"--output: {output} exists and is not an empty folder")


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is written last."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            continue
    return None


def options_of(args: Namespace) -> dict[str, Any]:
    """What the run depends on, as it is kept in options.json."""
    values = {name: getattr(args, name) for name in _LASTING + _FREE}
    for name in ("model", "config", "tokenizer"):
        if values[name] and os.path.exists(values[name]):
            values[name] = str(Path(values[name]).resolve())
    files = {"data": args.data, "selection": args.selection}
    return values | {
        name: None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
    }


def check_same(output: Path, now: dict[str, Any]) -> None:
    """Raises ValueError unless the run in this folder began with these options."""
    before = json.loads((output / OPTIONS_NAME).read_text("utf-8"))
    for name in [*_LASTING, "data", "selection"]:
        if before.get(name, now[name]) != now[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"--resume: the run began with another {option}"
                + ("" if name == "data" else f", {before[name]!r}, not {now[name]!r}")
            )


def _is_ours(path: Path) -> bool:
    """Whether it is an options.json of a run."""
    try:
        return json.loads(path.read_text("utf-8")).keys() >= set(_LASTING)
    except (OSError, ValueError, AttributeError):
        return False
