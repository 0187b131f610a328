"""What the compiler says of every kernel, without a GPU.

    python -m bench.static [--check] [--output bench/results/static/kernels.json]

Compiles every launch of bench.launches at the shapes of LLaMA-2-7B for sm_80, sm_90, sm_100 and
gfx942 in bf16, and for sm_90 in fp32, and writes registers, spills, shared memory, occupancy,
tensor-core and tensor-copy instructions, bytes, FLOPs and the least time they allow. The file
depends on the kernels and on triton's version alone. --check asks every launcher again for what it
would launch, compiles a few of that, and compares.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from bench import compiler, report
from bench.compiler import TARGETS, LaunchReport, Target
from bench.launches import CASES
from s2kernels.files import replacing

Job = tuple[str, torch.dtype, str]  # case, dtype, target

OUTPUT = report.RESULTS / "static" / "kernels.json"
SIZES = "7b"
JOBS = [
    *((case, torch.bfloat16, target) for case in CASES for target in TARGETS),
    *((case, torch.float32, "sm_90") for case in CASES),
]
SAMPLE = [
    ("linear_dx", torch.bfloat16, "sm_90"),
    ("slice_grad-in-64", torch.bfloat16, "sm_80"),
    ("swiglu", torch.bfloat16, "gfx942"),
]
# Of an H200: an 8192³ GEMM of cuBLAS on random bf16 data, and a copy within the device's memory.
CEILINGS = {"flops_per_second": 790e12, "bytes_per_second": 4.3e12}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static", description=__doc__.splitlines()[0]
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
        "sizes": vars(compiler.SIZES[SIZES]),
        "ceilings": CEILINGS,
        "kernels": rows(JOBS),
    }
    with replacing(args.output.parent) as folder:
        (folder / args.output.name).write_text(dumps(document), encoding="utf-8")
    print(report.table(summary(document["kernels"])))
    return 0


def differences(path: Path) -> list[str]:
    """What `path` says of the launches and of SAMPLE and is no longer so, in words."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["triton"] != version("triton"):
        return [f"made with triton {document['triton']}, but this is {version('triton')}"]
    listed = {
        launch_line(row["case"], row["dtype"], row["target"], row["kernel"], row["launch"])
        for row in document["kernels"]
    }
    now = {
        launch_line(case, _name(dtype), target, *launch)
        for (case, dtype, target), launches in compiled(compiler.launches_of, JOBS, workers=1)
        for launch in launches
    }
    rows_listed = {json.dumps(row) for row in document["kernels"]}
    rows_now = [json.dumps(row) for row in rows(SAMPLE, workers=1)]
    return [
        *(f"no longer launched: {line}" for line in sorted(listed - now)),
        *(f"not in the file: {line}" for line in sorted(now - listed)),
        *(f"not in the file: {row}" for row in rows_now if row not in rows_listed),
    ]


def launch_line(case: str, dtype: str, target: str, kernel: str, launch: dict) -> str:
    return " ".join([case, dtype, target, kernel, json.dumps(launch)])


def rows(jobs: list[Job], workers: int = 2) -> list[dict]:
    """One for each distinct launch of each job, in the order of the jobs."""
    return [
        row(*job, launch)
        for job, launches in compiled(compiler.launch_reports, jobs, workers)
        for launch in launches
    ]


def compiled(function: Callable, jobs: list[Job], workers: int) -> Iterator[tuple[Job, list]]:
    """(job, function of it), one after another, from processes whose triton compiles."""
    # Fresh ones: in this one triton may be interpreting.
    with ProcessPoolExecutor(
        max_workers=workers, mp_context=get_context("spawn"), initializer=compiler.start_worker
    ) as pool:
        futures = [
            pool.submit(function, case, SIZES, dtype, target) for case, dtype, target in jobs
        ]
        progress = tqdm(futures, unit="case", disable=None)
        for job, future in zip(jobs, progress, strict=True):
            yield job, future.result()


def row(case: str, dtype: torch.dtype, target: str, launch: LaunchReport) -> dict:
    chip = TARGETS[target]
    blocks, limit = occupancy(launch, chip)
    return {
        "case": case,
        "dtype": _name(dtype),
        "target": target,
        "kernel": launch.kernel,
        "launch": launch.launch,
        "grid": list(launch.grid),
        "registers": launch.registers,
        "spills": launch.spills,
        "shared_bytes": launch.shared_bytes,
        "warps": launch.num_warps,
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * launch.num_warps / chip.warps_sm, 3),
        "limited_by": limit,
        "dot": launch.has_dot,
        "matrix_instruction": launch.has_matrix_instruction,
        "tensor_copy": launch.has_tensor_copy,
        **_work(launch, dtype, target),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _work(launch: LaunchReport, dtype: torch.dtype, target: str) -> dict:
    """Bytes, FLOPs and, for an H200 in bf16, the least time they allow and what sets it."""
    if launch.work is None:
        return {}
    work = {"bytes": launch.work.bytes, "flops": launch.work.flops}
    if target != "sm_90" or dtype != torch.bfloat16:
        return work
    seconds = {
        "bytes": launch.work.bytes / CEILINGS["bytes_per_second"],
        "flops": launch.work.flops / CEILINGS["flops_per_second"] if launch.has_dot else 0.0,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return work | {"floor_us": round(seconds[bound] * 1e6, 2), "floor_by": bound}


def occupancy(launch: LaunchReport, chip: Target) -> tuple[int, str]:
    """(blocks that a multiprocessor holds at once, what keeps it from holding more)."""
    registers = -(-max(launch.registers, 1) // chip.register_granule) * chip.register_granule
    quarters = 4
    warps_by_registers = quarters * (chip.registers_lane // registers)
    shared = launch.shared_bytes + chip.shared_bytes_reserved
    limits = {
        "blocks": chip.blocks_sm,
        "warps": chip.warps_sm // launch.num_warps,
        "registers": warps_by_registers // launch.num_warps,
        "shared memory": chip.shared_bytes_sm // shared if shared else chip.blocks_sm,
    }
    if launch.tensor_memory_columns:
        limits["tensor memory"] = 512 // launch.tensor_memory_columns
    blocks = min(limits.values())
    return blocks, ", ".join(name for name, limit in limits.items() if limit == blocks)


def dumps(document: dict) -> str:
    """JSON with a line for each kernel: what changes shows as the line it is."""
    head = {name: value for name, value in document.items() if name != "kernels"}
    lines = ",\n".join(f"  {json.dumps(kernel)}" for kernel in document["kernels"])
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n'


def summary(kernels: list[dict]) -> list[list[str]]:
    return [
        ["case", "dtype", "target", "registers", "spills", "shared", "blocks", "by", "floor us"],
        *_summary_rows(kernels),
    ]


def _summary_rows(kernels: list[dict]) -> Iterator[list[str]]:
    for kernel in kernels:
        yield [
            f"{kernel['case']} {kernel['kernel']}",
            kernel["dtype"],
            kernel["target"],
            str(kernel["registers"]),
            str(kernel["spills"]),
            str(kernel["shared_bytes"]),
            str(kernel["blocks_per_sm"]),
            kernel["limited_by"],
            f"{kernel['floor_us']:.1f}" if "floor_us" in kernel else "-",
        ]


if __name__ == "__main__":
    sys.exit(main())
