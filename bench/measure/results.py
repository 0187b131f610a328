"""Files of results, in the shape of pytest-benchmark's JSON. They grow entry by entry."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info

from bench.measure import machine
from s2kernels.files import replacing

FOLDER = machine.ROOT / "bench" / "results"
VERSION = "4"  # of what extra_info and params hold


def write(path: Path, benchmarks: list[dict], machine_info: dict) -> None:
    """Replaces `path` atomically."""
    document = {
        "machine_info": machine_info,
        "commit_info": get_commit_info(),
        "benchmarks": benchmarks,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": VERSION,
    }
    with replacing(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> dict:
    """The document in `path`. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"results must be in {path}: no such file")
    return json.loads(path.read_text())


class Results:
    """The entries of one file by their fullname. The file is written after each new entry.

    A file of another machine, of other packages or of another version is begun again. An entry of
    other code stays in the file until the same case is measured again.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.source = path, machine.source_hash()
        self.machine_info = machine.machine_info(device)
        self.entries: dict[str, dict] = {}
        if path.is_file():
            document = read(path)
            before = document["machine_info"]
            same = machine.same_machine(before, self.machine_info)
            if same and document["version"] == VERSION:
                self.entries = {entry["fullname"]: entry for entry in document["benchmarks"]}
                self.machine_info = before | self.machine_info
            else:
                print(f"{path} is of another machine or of other versions: it is begun again")

    def has(self, fullname: str) -> bool:
        """Whether this case was measured with the code of today."""
        entry = self.entries.get(fullname)
        return entry is not None and entry["extra_info"].get("source") == self.source

    def add(self, entry: dict) -> None:
        entry["extra_info"]["source"] = self.source
        self.entries[entry["fullname"]] = entry
        write(self.path, list(self.entries.values()), self.machine_info)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right. A rule below the head."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    line = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    rule = ["-" * width for width in (first, *others)]
    return "\n".join(line.format(*row).rstrip() for row in (rows[0], rule, *rows[1:]))
