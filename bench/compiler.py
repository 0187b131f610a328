"""Compile the kernels for GPUs that are not there, and read what came out.

`launch_reports` runs a launcher on meta tensors of a real model's shapes with `JITFunction.run`
replaced by a recorder, compiles every launch it recorded as the JIT would for that GPU, same
specialisation included, and reports registers, spills, shared memory and tensor-core
instructions. It must run in a process whose triton was imported without TRITON_INTERPRET:
`start_worker` sees to that. Nothing here imports triton or the kernels at import time.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from bench.launches import CASES, SIZES, Launch, Sizes
from bench.work import WORK, Work


@dataclass(frozen=True)
class Target:
    """A chip: triton's name for it, what its blocks and multiprocessors have, the instructions of
    its tensor cores and of its tensor copy engine.
    """

    backend: str
    arch: int | str
    matrix_instruction: str
    num_sms: int
    shared_bytes: int  # that one block may have
    shared_bytes_sm: int
    shared_bytes_reserved: int  # of every block, by the driver
    registers_lane: int = 512  # of one lane in each quarter of a multiprocessor
    register_granule: int = 8
    warps_sm: int = 64
    blocks_sm: int = 32
    warp_size: int = 32
    copy_instruction: str | None = None


_TMA = r"\bcp\.async\.bulk\.tensor"
_KIB = 1024
TARGETS = {
    "sm_80": Target("cuda", 80, r"\bmma\.sync", 108, 163 * _KIB, 164 * _KIB, _KIB),
    "sm_90": Target(
        *("cuda", 90, r"\bwgmma\.mma_async", 132, 227 * _KIB, 228 * _KIB, _KIB),
        copy_instruction=_TMA,
    ),
    "sm_100": Target(
        *("cuda", 100, r"\btcgen05\.mma", 148, 227 * _KIB, 228 * _KIB, _KIB),
        copy_instruction=_TMA,
    ),
    "gfx942": Target(
        *("hip", "gfx942", r"\bv_mfma_", 304, 64 * _KIB, 64 * _KIB, 0),
        warps_sm=32,
        warp_size=64,
    ),
}


@dataclass(frozen=True)
class Recorded:
    """A launch that a launcher asked for: arguments by name, constexprs and options included."""

    kernel: Any  # a JITFunction
    arguments: tuple
    options: dict[str, Any]
    grid: tuple[int, ...]

    def named(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options

    def plain_options(self) -> dict[str, Any]:
        """What JSON can say of them: numbers as they are, a dtype of triton by its name."""
        return {
            name: value if isinstance(value, int | str | None) else str(value)
            for name, value in self.options.items()
        }


@dataclass(frozen=True)
class LaunchReport:
    """One compiled launch. Spills count registers or bytes put in local memory, by the compiler.

    launch: its constexprs and options. work: bytes and FLOPs it cannot do without, None where
    `bench.work` does not know the kernel.
    """

    kernel: str
    launch: dict[str, Any]
    grid: tuple[int, ...]
    work: Work | None
    has_dot: bool
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    tensor_memory_columns: int
    has_matrix_instruction: bool
    has_register_wgmma: bool
    has_tensor_copy: bool


def start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def launch_reports(case: str, sizes: str, dtype: torch.dtype, target: str) -> list[LaunchReport]:
    """One report for each distinct launch of a case on a target of `TARGETS`."""
    chip = TARGETS[target]
    reports = {}
    for launch in _recorded_launches(CASES[case], dtype, SIZES[sizes], target):
        compiled = _compile(launch, chip)
        if compiled.hash not in reports:
            reports[compiled.hash] = _report(launch, compiled, chip)
    return list(reports.values())


def launches_of(
    case: str, sizes: str, dtype: torch.dtype, target: str
) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, constexprs and options) of every launch of a case, uncompiled."""
    recorded = _recorded_launches(CASES[case], dtype, SIZES[sizes], target)
    return [(launch.kernel.__name__, launch.plain_options()) for launch in recorded]


def uncovered_kernels() -> set[str]:
    """The kernels of the package that no case launches."""
    import importlib
    import pkgutil

    from triton.runtime.jit import JITFunction

    from s2kernels import kernels

    defined = {
        name
        for module in pkgutil.iter_modules(kernels.__path__, "s2kernels.kernels.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    launched = {
        recorded.kernel.__name__
        for launch in CASES.values()
        for target in TARGETS
        for recorded in _recorded_launches(launch, torch.bfloat16, SIZES["7b"], target)
    }
    return defined - launched


def _recorded_launches(
    launch: Launch, dtype: torch.dtype, sizes: Sizes, target: str
) -> list[Recorded]:
    """What the launchers would run on that chip."""
    from triton.runtime.jit import JITFunction

    from s2kernels import kernels
    from s2kernels.kernels import target as hardware

    launches = []

    def record(self, *args, grid, warmup, **options):
        launches.append(Recorded(self, args, options, tuple(grid)))

    chip = hardware.Chip("none", target, TARGETS[target].num_sms)
    with (
        patch.object(JITFunction, "run", record),
        patch.object(hardware, "WITHOUT_GPU", chip),
    ):
        launch(kernels, dtype, sizes)
    return launches


def _compile(launch: Recorded, chip: Target):
    """What JITFunction.run does between the launch and the driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    backend = make_backend(gpu)
    kernel, options = launch.kernel, {**launch.options, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*launch.arguments, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(
        backend, options, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=gpu, options=parsed.__dict__)


def _report(launch: Recorded, compiled, chip: Target) -> LaunchReport:
    if chip.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spills = _cubin_resources(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, *spilled = (
            int(re.search(rf"\.{field}:\s*(\d+)", assembly)[1])
            for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        )
        spills = sum(spilled)
    work = WORK.get(launch.kernel.__name__)
    return LaunchReport(
        kernel=compiled.metadata.name,
        launch=launch.plain_options(),
        grid=launch.grid,
        work=None if work is None else work(launch.named(), launch.grid),
        has_dot="tt.dot" in compiled.asm["ttir"],
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        has_matrix_instruction=re.search(chip.matrix_instruction, assembly) is not None,
        # One brace group holds the accumulator; a second one, the first operand in registers.
        has_register_wgmma=re.search(r"wgmma\.mma_async[^;{]*\{[^;{]*\{", assembly) is not None,
        has_tensor_copy=chip.copy_instruction is not None
        and re.search(chip.copy_instruction, assembly) is not None,
    )


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack and local memory), both 0 without spills."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local
