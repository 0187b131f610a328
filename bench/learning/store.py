"""Results of runs: one JSON file a study, written after every run."""

import json
from pathlib import Path

import torch

from bench.measure import machine
from s2kernels.files import replacing


class Store:
    """The files of a folder. A run is found by its key, in whichever file it is."""

    def __init__(self, folder: Path, common: dict) -> None:
        """common: what decides all runs alike: protocol, model and data."""
        self.folder, self.common = folder, common
        self.files: dict[str, list[dict]] = {}
        for path in sorted(folder.glob("*.json")):
            document = json.loads(path.read_text())
            if "runs" in document:  # theory.json has none
                self.files[path.stem] = document["runs"]

    def find(self, key: dict) -> dict | None:
        """The result of a run that was done before."""
        wanted = plainly(key | self.common)
        for runs in self.files.values():
            for entry in runs:
                if plainly(entry["run"] | entry["common"]) == wanted:
                    return entry["result"]
        return None

    def add(self, study: str, key: dict, result: dict, notes: dict) -> None:
        """Puts a result into the file of `study`, which is replaced atomically."""
        runs = self.files.setdefault(study, [])
        runs.append({"run": key, "common": self.common, "result": result})
        document = {
            "machine_info": machine.machine_info(torch.device("cpu")),
            "left out": notes,
            "runs": runs,
        }
        with replacing(self.folder) as folder:
            (folder / f"{study}.json").write_text(json.dumps(rounded(document), indent=1) + "\n")


def plainly(key: dict) -> str:
    """A key as text; tuples and lists are the same, numbers are as they are written."""
    return json.dumps(rounded(key), sort_keys=True)


def rounded(value):
    """Every float with six digits: more would only make the files long."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value
