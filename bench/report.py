"""Results as files and as a table. The files have the shape of pytest-benchmark's JSON."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from s2kernels.files import replacing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "plots" / "figures"
VERSION = "3"  # of the format of the files
PACKAGES = ("torch", "triton", "transformers", "peft")


def device_name(device: torch.device) -> str:
    """The folder of a device's results: "cpu", or "nvidia-h200" and the like."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def machine_info(device: torch.device) -> dict:
    """What the numbers depend on; the name of the host is nobody's business."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "release": platform.release(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": _cpu_name(), "count": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        **{package: _installed(package) for package in PACKAGES},
    }


def commit_info() -> dict:
    """The commit measured; id and dirty None where there is none, or no git."""
    commit = _output("git", "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "id": commit,
        "branch": _output("git", "branch", "--show-current"),
        "time": _output("git", "log", "-1", "--format=%cI"),
        "dirty": None if commit is None else bool(changed),
    }


@functools.cache
def source_hash() -> str:
    """Of the code that a training step runs: the package but for its commands, and the methods."""
    package, commands = ROOT / "s2kernels", ROOT / "s2kernels" / "cli"
    files = [file for file in package.rglob("*.py") if commands not in file.parents]
    digest = hashlib.sha256()
    for file in sorted([*files, *(ROOT / "bench" / "methods").rglob("*.py")]):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def same_machine(a: dict, b: dict) -> bool:
    """Whether two machine_infos say that times may stand side by side: device and packages, and on
    a CPU the allocator of `bench.host`."""
    device = ("gpu",) if a.get("gpu") else ("gpu", "machine", "cpu", "threads", "allocator")
    return all(a.get(name) == b.get(name) for name in (*device, *PACKAGES))


def gpu_clocks(device: torch.device) -> dict | None:
    """MHz and the like, as nvidia-smi reads them at work; None without a GPU or nvidia-smi."""
    if device.type != "cuda":
        return None
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    busy = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(500):  # about a second, while nvidia-smi looks
        busy @ busy
    query = f"--id={device.index or 0}", f"--query-gpu={','.join(names)}"
    read = _output("nvidia-smi", *query, "--format=csv,noheader,nounits")
    torch.cuda.synchronize(device)
    return None if read is None else dict(zip(names, read.split(", "), strict=True))


def write_json(
    path: Path, benchmarks: list[dict], device: torch.device, machine: dict | None = None
) -> None:
    """Writes `path` whole or not at all. machine: its machine_info, if that is known already."""
    document = {
        "machine_info": machine or machine_info(device),
        "commit_info": commit_info(),
        "benchmarks": benchmarks,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": VERSION,
    }
    with replacing(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(document, indent=1) + "\n")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right. A rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def methods_table(entries: Mapping[str, dict]) -> str:
    """The demo's table, one line a method, from its entries in the JSON."""
    head = ["method", "lr", "trained", "step ms", "x floor", "quartiles", "as run"]
    rows = [head + ["weights", "gradients", "optimizer", "saved", "held-out loss"]]
    for name, entry in entries.items():
        extra = entry["extra_info"]
        ratio, held_out = extra["ratio_to_floor"], extra["held_out"]["losses"]
        sizes = [extra["bytes"][part] for part in ("weights", "gradients", "optimizer", "saved")]
        rows.append(
            [
                name,
                "-" if extra["lr"] is None else f"{extra['lr']:g}",
                f"{extra['trained_parameters']:,}",
                f"{entry['stats']['median'] * 1e3:.1f}",
                f"{ratio['median']:.3f}",
                f"{ratio['q1']:.3f}..{ratio['q3']:.3f}",
                f"{extra['as_run']['ratio_to_floor']:.3f}" if "as_run" in extra else "-",
                *(f"{size / 2**20:.2f}" for size in sizes),
                f"{held_out[0]:.3f} -> {held_out[-1]:.3f}",
            ]
        )
    return table(rows)


STEPS_LEGEND = (
    "x floor, step, forward, backward, optimizer (with zeroing; periodic work is in the step): "
    "medians of paired rounds; ms\n"
    "peak: highest of three steps, first: of the first step, saved: kept for the backward; MiB\n"
    "model: predicted over measured, step and peak; ~: timed apart from its floor"
)


def steps_table(entries: Sequence[dict]) -> str:
    """The laboratory's table, one line a case, from its entries in the JSON."""
    head = ["case", "trained", "x floor", "quartiles", "step", "forward", "backward", "optimizer"]
    rows = [head + ["tokens/s", "peak", "first", "saved", "ops", "model"]]
    for entry in entries:
        extra, stats = entry["extra_info"], entry["stats"]
        if extra["status"] != "measured":
            rows.append([entry["name"], extra["status"].partition(":")[0]])
            rows[-1] += [""] * (len(rows[0]) - 2)
            continue
        sizes = extra["bytes"]
        memory = [sizes[part] for part in ("peak", "first_step_peak", "saved")]
        rows.append(
            [
                entry["name"],
                f"{extra['trained_parameters']:,}",
                *(["-"] * 7 if stats is None else _times(extra, stats["median"])),
                *("-" if size is None else f"{size / 2**20:.1f}" for size in memory),
                "-" if extra["ops"] is None else str(extra["ops"]),
                _predicted(extra["model"], stats and stats["median"], sizes["peak"]),
            ]
        )
    return table(rows)


def _times(extra: dict, median: float) -> list[str]:
    """Seven cells of `steps_table`, from "x floor" to "tokens/s"."""
    ratio, seconds = extra["ratio_to_floor"], extra["seconds"]
    parts = [seconds[part] for part in ("forward", "backward", "optimizer")]
    return [
        f"{ratio['median']:.3f}" + ("" if extra["paired"] else "~"),
        f"{ratio['q1']:.3f}..{ratio['q3']:.3f}",
        *(f"{value * 1e3:.1f}" for value in (median, *parts)),
        f"{extra['tokens_per_second']:,.0f}",
    ]


def _predicted(model: dict | None, seconds: float | None, peak: int) -> str:
    if model is None:
        return "-"
    of_step = "-" if seconds is None else f"{model['seconds'] / seconds:.2f}"
    return f"{of_step} {model['peak'] / peak:.2f}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Standard output of a command run in the repository; None where it fails or says nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
