"""What the compiler says of every kernel, for GPUs that are not there.

    python -m bench.kernels.compile [--check] [--output bench/results/static/kernels.json]

The launchers of `bench.kernels.ops` run on operands without content, with `JITFunction.run`
replaced by a recorder. Every recorded launch is compiled as the JIT would for that GPU: at the
shapes of LLaMA-2-7B for sm_80, sm_90, sm_100 and gfx942 in bf16, and for sm_90 in fp32. A row of
the table is a distinct launch: its registers, spills, shared memory, occupancy and instructions,
and of the whole call of the op the bytes, the FLOPs and the least time that they allow. The table
depends on the kernels and on triton's version alone. --check asks every launcher again what it
would launch, compiles a few of that, and compares.

All that happens in processes whose triton was imported without TRITON_INTERPRET: see
`start_worker`. Nothing here imports triton or the kernels at import time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from bench.kernels.chips import TARGETS, occupancy
from bench.measure import results
from bench.steps.work import GPUS, OPS, Work
from s2kernels.files import replacing

Job = tuple[str, str, torch.dtype, str]  # a key of ops.CASES, one of SIZES, dtype, target

# (M, N, K) of LLaMA-2-7B's down_proj, and the same with no alignment left, which makes other code.
SIZES = {"7b": (8192, 4096, 11008), "ragged": (8191, 4097, 11009)}
RANK = 256
OUTPUT = results.FOLDER / "static" / "kernels.json"
SAMPLE = [
    ("linear_dx", "7b", torch.bfloat16, "sm_90"),
    ("slice_grad-in-64", "7b", torch.bfloat16, "sm_80"),
    ("swiglu", "7b", torch.bfloat16, "gfx942"),
]
H200 = GPUS["H200"]
# Of 16 bytes by one thread.
_WIDE_STORE = r"\bst\.global\.(?:\w+\.)*(?:v4\.\w32|v2\.\w64)|\bglobal_store_dwordx4"


@dataclass(frozen=True)
class Recorded:
    """A launch that a launcher asked for, with what the call of the op has to do."""

    asked: dict  # the first columns of its row
    kernel: Any  # a JITFunction
    arguments: tuple
    options: dict[str, Any]
    grid: tuple[int, ...]
    work: Work


def jobs() -> list[Job]:
    """Those of the table."""
    from bench.kernels.ops import CASES

    half = [(case, "7b", torch.bfloat16, target) for case in CASES for target in TARGETS]
    return [*half, *((case, "7b", torch.float32, "sm_90") for case in CASES)]


def start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def rows_of(job: Job) -> list[dict]:
    """A row for each distinct launch of a case."""
    rows: dict[str, dict] = {}
    for launch in recorded(job):
        compiled = _compile(launch)
        if compiled.hash not in rows:
            rows[compiled.hash] = row(launch, compiled)
    return list(rows.values())


def launches_of(job: Job) -> list[dict]:
    """What the rows of a case say of every launch before it is compiled."""
    return [launch.asked for launch in recorded(job)]


def recorded(job: Job) -> list[Recorded]:
    """What the launchers would run on that chip."""
    from triton.runtime.jit import JITFunction

    from bench.kernels.ops import CASES, Operands, Sizes
    from s2kernels import kernels
    from s2kernels.kernels import target as hardware

    torch.manual_seed(0)  # how many entries are drawn decides what a launch is specialised to
    name, sizes, dtype, target = job
    case, launches = CASES[name], []
    operands = Operands(torch.device("meta"), dtype, random=False)

    def record(self, *args, grid, warmup, **options):
        asked = {
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "target": target,
            "kernel": self.__name__,
            "launch": {  # numbers as they are, a dtype of triton by its name
                key: value if isinstance(value, int | str | None) else str(value)
                for key, value in options.items()
            },
        }
        launches.append(Recorded(asked, self, args, options, tuple(grid), work))

    chip = hardware.Chip("none", target, TARGETS[target].num_sms)
    with patch.object(JITFunction, "run", record), patch.object(hardware, "WITHOUT_GPU", chip):
        for arguments in case.calls(operands, Sizes(sizes, *SIZES[sizes], case.rank or RANK)):
            work = OPS[case.op](*arguments)
            (case.launch or getattr(kernels, case.op))(*arguments)
    return launches


def _compile(launch: Recorded):
    """What the JIT compiles, where the driver says that the chip is there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    chip = TARGETS[launch.asked["target"]]
    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    says = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: chip.arch,  # the JIT has a cache for each device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(says)
    return launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)


def row(launch: Recorded, compiled: Any) -> dict:
    """The launch in the table. Spills count registers, or bytes of a thread's local memory."""
    from triton import knobs

    chip = TARGETS[launch.asked["target"]]
    if chip.backend == "cuda":
        assembly = compiled.asm["ptx"]
        cubin = compiled.metadata_group[f"{compiled.name}.cubin"]
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        fields = "REG", "STACK", "LOCAL"
    else:
        assembly = usage = compiled.asm["amdgcn"]
        fields = "vgpr_count", "vgpr_spill_count", "sgpr_spill_count"
    registers, *spilled = (int(re.search(rf"\b{f}:\s*(\d+)", usage)[1]) for f in fields)
    copy = chip.copy_instruction
    found = launch.asked | {
        "grid": list(launch.grid),
        "registers": registers,
        "spills": sum(spilled),
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "warps": compiled.metadata.num_warps,
        "dot": "tt.dot" in compiled.asm["ttir"],
        "matrix_instruction": re.search(chip.matrix_instruction, assembly) is not None,
        "wide_store": re.search(_WIDE_STORE, assembly) is not None,
        # One brace group holds the accumulator; a second one, the first operand in registers.
        "register_wgmma": re.search(r"wgmma\.mma_async[^;{]*\{[^;{]*\{", assembly) is not None,
        "tensor_copy": copy is not None and re.search(copy, assembly) is not None,
    }
    return found | occupancy(found, chip) | floor(found, launch.work)


def floor(row: dict, work: Work) -> dict:
    """Bytes, FLOPs and, for an H200 in bf16, the least time they allow and what sets it."""
    needed = {"bytes": work.bytes, "flops": work.flops}
    if (row["target"], row["dtype"]) != ("sm_90", "bfloat16"):
        return needed
    by_bytes = work.bytes / H200.bytes
    by_flops = work.flops / H200.rate(row["dtype"]) if row["dot"] else 0.0
    floor_us = round(max(by_bytes, by_flops) * 1e6, 2)
    return needed | {"floor_us": floor_us, "floor_by": "flops" if by_flops > by_bytes else "bytes"}


def collected(function: Callable[[Job], list[dict]], jobs: list[Job], workers: int) -> list[dict]:
    """What `function` finds of each job, from processes whose triton compiles."""
    # Fresh ones: in this one triton may be interpreting.
    with ProcessPoolExecutor(
        max_workers=workers, mp_context=get_context("spawn"), initializer=start_worker
    ) as pool:
        found = tqdm(pool.map(function, jobs), total=len(jobs), unit="case", disable=None)
        return [row for rows in found for row in rows]


def differences(path: Path) -> list[str]:
    """What `path` says of the launches and of SAMPLE and is no longer so, in words."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["triton"] != version("triton"):
        return [f"made with triton {document['triton']}, but this is {version('triton')}"]
    asked = collected(launches_of, jobs(), workers=1)
    now = set(map(json.dumps, asked))
    listed = {json.dumps({name: row[name] for name in asked[0]}) for row in document["kernels"]}
    rows = set(map(json.dumps, document["kernels"]))
    sample = map(json.dumps, collected(rows_of, SAMPLE, workers=1))
    return [
        *(f"no longer launched: {line}" for line in sorted(listed - now)),
        *(f"not in the file: {line}" for line in sorted(now - listed)),
        *(f"not in the file: {row}" for row in sample if row not in rows),
    ]


def dumps(document: dict) -> str:
    """JSON with a line for each kernel: what changes shows as the line it is."""
    head = {name: value for name, value in document.items() if name != "kernels"}
    lines = ",\n".join(f"  {json.dumps(kernel)}" for kernel in document["kernels"])
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.compile", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="compile a sample and compare it")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.check:
        differing = differences(args.output)
        print("\n".join(differing) or "launches and sample are as the file says")
        return 1 if differing else 0

    document = {
        "triton": version("triton"),
        "sizes": dict(zip("mnk", SIZES["7b"], strict=True)),
        "ceilings": vars(H200),
        "kernels": collected(rows_of, jobs(), workers=2),
    }
    with replacing(args.output.parent) as folder:
        (folder / args.output.name).write_text(dumps(document), encoding="utf-8")
    print(f"{len(document['kernels'])} launches in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
