"""A results file that grows case by case and survives being stopped at any moment."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from bench import report


class Record:
    """The entries of one file, by their fullname; the file is written after every one.

    Entries of another machine, or of other versions of what they were measured with or of this
    format, must not stand beside new ones: such a file is begun anew. Of the same machine, what the
    file says beyond `report.machine_info` (ceilings, clocks) stays as long as any of its entries
    does: it is what they were measured beside.
    """

    def __init__(self, path: Path, device: torch.device, machine: dict):
        self.path, self.device = path, device
        self.machine = self._found = report.machine_info(device) | machine
        self.entries: dict[str, dict] = {}
        if not path.is_file():
            return
        document = json.loads(path.read_text())
        same_format = document["version"] == report.VERSION
        if same_format and report.same_machine(document["machine_info"], self.machine):
            self.entries = {entry["fullname"]: entry for entry in document["benchmarks"]}
            before = document["machine_info"]
            kept = {name: before[name] for name in machine if before.get(name) is not None}
            self.machine = self.machine | kept
        else:
            print(f"{path} is of another machine or of other versions: begun anew")

    def forget(self, names: Iterable[str]) -> None:
        """Leaves out the entries of these fullnames from the next time that the file is written."""
        for name in names:
            self.entries.pop(name, None)
        if not self.entries:
            self.machine = self._found

    def add(self, *entries: dict) -> None:
        self.entries |= {entry["fullname"]: entry for entry in entries}
        report.write_json(self.path, list(self.entries.values()), self.device, self.machine)
