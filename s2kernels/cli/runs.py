"""The folder of a run of `s2kernels finetune`: its settings and its checkpoints.

The settings are the options of the command line; the file that keeps them can be given back to it.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SETTINGS_NAME = "run.yaml"
# What decides which heads and channels are trained, where no --selection does.
CHOICE = "heads channels granularity strategy smallest scope".split()
# Options that one method alone has.
OWN = {"s2ft": [*CHOICE, "selection", "layout"], "spiel": ["density"], "lora": ["rank"]}
# What a run may be resumed with another value of: the result does not depend on it, or, of its
# length, a run can be prolonged.
_FREE = "mode gradient_checkpointing epochs max_steps save_steps device prompt strict".split()
_NOT_KEPT = "command parser given config output resume".split()
_PATHS = {"model", "tokenizer", "data", "selection"}


def settle(args: Namespace) -> None:
    """Make None of the options that the method, or --selection, has no use for.

    Raises ValueError where one of them is among the arguments that were given.
    """
    useless = {n: f"goes with --method {m}" for m in OWN for n in OWN[m] if m != args.method}
    if args.selection:
        useless |= dict.fromkeys(CHOICE, "does not go with --selection, which says what to train")
    for name, why in useless.items():
        if _option(name) in args.given:
            raise ValueError(f"{_option(name)} {why}")
        setattr(args, name, None)


def check_empty(output: Path) -> None:
    """Raises ValueError unless a folder does not exist, or is empty."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output: {output} exists and is not an empty folder")


def check_new(output: Path) -> None:
    """Raises ValueError unless a run can begin in this folder: an empty one, or one where a run has
    ended before its first checkpoint.
    """
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = {name for name in names if not name.startswith(("checkpoint-", ".writing-"))}
    if others != {SETTINGS_NAME} or not read_settings(output) or last_checkpoint(output):
        check_empty(output)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: that has the file which is written last."""
    spiel = read_settings(output).get("method") == "spiel"
    last = "spiel_tuner.json" if spiel else "trainer_state.json"
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        with suppress(OSError, ValueError):
            json.loads((path / last).read_text())
            return path
    return None


def settings_of(args: Namespace, sources: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The options of a run, as they are kept in run.yaml, its number of processes, and digests of
    the files, or names on the hub, that were given by an option.
    """
    kept = {k: v for k, v in vars(args).items() if k not in _NOT_KEPT and v is not None}
    for name in _PATHS & kept.keys():
        names = kept[name] if isinstance(kept[name], list) else [kept[name]]
        names = [str(Path(n).resolve()) if Path(n).exists() else str(n) for n in names]
        kept[name] = names if isinstance(kept[name], list) else names[0]
    if args.max_steps:
        del kept["epochs"]
    digests = {}
    for name, given in sources.items():
        digest = hashlib.sha256()
        for source in given:
            digest.update(source.read_bytes() if isinstance(source, Path) else source.encode())
        digests[name] = digest.hexdigest()
    return kept | {"num_processes": int(os.environ.get("WORLD_SIZE", 1)), "sha256": digests}


def read_settings(folder: Path) -> dict[str, Any]:
    """What run.yaml in a folder says; nothing where there is none of ours."""
    try:
        found = _read(folder / SETTINGS_NAME)
    except (OSError, ValueError):
        return {}
    return found if "method" in found else {}


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a mapping of options to values wanted")
    return found


def check_same(output: Path, now: dict[str, Any]) -> None:
    """Raises ValueError unless the run in this folder began with these settings and files."""
    before = read_settings(output)
    files, digests = before.get("sha256", {}), now["sha256"]  # which may lie elsewhere now
    for name in sorted((before.keys() | now.keys()) - {*_FREE, "sha256"}):
        of_file = name in files or name in digests
        old, new = (files, digests) if of_file else (before, now)
        if old.get(name) != new.get(name):
            values = "" if of_file else f", {before.get(name)!r}, not {now.get(name)!r}"
            raise ValueError(f"--resume: the run began with another {_option(name)}{values}")


def as_arguments(path: Path, others: Sequence[str], method: str | None) -> list[str]:
    """The options in a YAML file, such as run.yaml, as arguments of the command line, but for those
    that `others`, its arguments, have, or have something else for; and for those of the file's
    method where `method`, that of the command line, is another one.

    Raises ValueError unless it is a mapping of options to values.
    """
    found = _read(path)
    given = {word.partition("=")[0] for word in others}
    dropped = {"num_processes", "sha256", *(name for name in found if _option(str(name)) in given)}
    if given & {"--epochs", "--max-steps"}:
        dropped |= {"epochs", "max_steps"}
    if "--selection" in given:
        dropped |= set(CHOICE)
    if method not in (None, found.get("method", "s2ft")):
        dropped |= {name for names in OWN.values() for name in names}
    arguments = []
    for name, value in found.items():
        option = _option(str(name))
        if value is None or value is False or name in dropped:
            continue
        if isinstance(value, list):
            arguments += [option, *map(str, value)] if value else []
        else:
            arguments.append(option if value is True else f"{option}={value}")
    return arguments


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
