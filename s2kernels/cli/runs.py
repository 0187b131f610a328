"""The folder of a run of `s2kernels finetune`: its settings and its checkpoints."""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS_NAME = "run.yaml"
BASE_NAME = "base"  # the folder of the random model of --model-config

# What decides which heads and channels are trained, where no --selection does.
CHOICE = "heads channels granularity strategy smallest scope calibration_share".split()
# Options that one method alone has.
OWN = {"s2ft": [*CHOICE, "selection", "layout"], "spiel": ["density"], "lora": ["rank"]}
# What a run may be resumed with another value of: the result does not depend on it, or, of its
# length, a run can be prolonged.
_FREE = "mode gradient_checkpointing epochs max_steps save_steps device prompt strict".split()
_NOT_KEPT = "prepare parser defaults config output resume".split()
_PATHS = "model model_config tokenizer data selection".split()


def settle(args: Namespace) -> None:
    """Put the defaults in the place of the method's own options that were not given: None so far.

    With --selection those of CHOICE stay None. Raises ValueError for an option of another method,
    or of CHOICE along with --selection.
    """
    for method, names in OWN.items():
        given = [name for name in names if getattr(args, name) is not None]
        if method != args.method and given:
            raise ValueError(f"{_option(given[0])} goes with --method {method}")
        chosen = [name for name in given if name in CHOICE]
        if args.selection and chosen:
            raise ValueError(
                f"--selection says which heads and channels to train, {_option(chosen[0])} cannot"
            )
        if method == args.method:
            for name in set(names) - set(given) - set(CHOICE if args.selection else ()):
                setattr(args, name, args.defaults[name])


def check_new(output: Path) -> None:
    """Raises ValueError unless a run can begin in this folder: one that does not exist or is empty,
    or where a run has ended before its first checkpoint.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = {name for name in names if not name.startswith(("checkpoint-", ".writing-"))}
    began = others <= {SETTINGS_NAME, BASE_NAME} and "method" in read_settings(output)
    if not began or last_checkpoint(output):
        raise ValueError(f"--output: {output} exists and is not an empty folder")


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is written last, but for what
    SpIEL needs.
    """
    wanted = ["trainer_state.json"]
    if read_settings(output).get("method") == "spiel":
        wanted.append("spiel_tuner.json")
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            for name in wanted:
                json.loads((path / name).read_text())
            return path
        except (OSError, ValueError):
            continue
    return None


def settings_of(args: Namespace, sources: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The options of a run, as they are kept in run.yaml, and digests of the files, or names on the
    hub, that were given by an option.
    """
    kept: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name in _PATHS and value is not None:
            names = value if isinstance(value, list) else [value]
            names = [str(Path(n).resolve()) if os.path.exists(n) else str(n) for n in names]
            value = names if isinstance(value, list) else names[0]
        if name not in _NOT_KEPT and value is not None:
            kept[name] = value
    if args.max_steps:
        del kept["epochs"]
    digests = {}
    for name, given in sources.items():
        digest = hashlib.sha256()
        for source in given:
            digest.update(source.read_bytes() if isinstance(source, Path) else source.encode())
        digests[name] = digest.hexdigest()
    return kept | {"sha256": digests}


def read_settings(folder: Path) -> dict[str, Any]:
    """What run.yaml in a folder says; empty where there is none of ours."""
    import yaml

    try:
        found = yaml.safe_load((folder / SETTINGS_NAME).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def check_same(output: Path, now: dict[str, Any]) -> None:
    """Raises ValueError unless the run in this folder began with these settings and files."""
    before = read_settings(output)
    of_files = {"data", "selection"}
    for name in sorted((before.keys() | now.keys()) - of_files - {*_FREE, "sha256"}):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume: the run began with another {_option(name)}, {before.get(name)!r}, not "
                f"{now.get(name)!r}"
            )
    for name in of_files:
        if before.get("sha256", {}).get(name) != now["sha256"].get(name):
            raise ValueError(f"--resume: the run began with another {_option(name)}")


def as_arguments(path: Path, others: Sequence[str]) -> list[str]:
    """The options in a YAML file, such as run.yaml, as arguments of the command line, but for those
    that `others`, its arguments, have, or cannot have along with theirs.

    Raises ValueError unless it is a mapping of options to values.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config: {path}: a mapping of options to values wanted")
    given = {word.partition("=")[0] for word in others}
    dropped = {"sha256"}
    for pair in ("model", "model_config"), ("epochs", "max_steps"):
        dropped |= set(pair) if given & set(map(_option, pair)) else set()
    dropped |= set(CHOICE) if "--selection" in given else set()
    if "--method" in given:
        dropped |= {name for names in OWN.values() for name in names}
    arguments = []
    for name, value in found.items():
        option = _option(str(name))
        if value is None or value is False or name in dropped or option in given:
            continue
        if isinstance(value, list):
            arguments += [option, *map(str, value)] if value else []
        else:
            arguments.append(option if value is True else f"{option}={value}")
    return arguments


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
