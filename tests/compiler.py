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
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class Target:
    """A chip: triton's name for it, the shared memory of one block, its tensor-core instruction."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    matrix_instruction: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, r"\bmma\.sync"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, r"\bwgmma\.mma_async"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, r"\btcgen05\.mma"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, r"\bv_mfma_"),
}


@dataclass(frozen=True)
class Sizes:
    """Tokens, hidden size and FFN size of a model."""

    M: int
    hidden: int
    ffn: int


# Those of LLaMA-2-7B, and the same with no alignment left, which makes other code.
SIZES = {"7b": Sizes(8192, 4096, 11008), "ragged": Sizes(8191, 4097, 11009)}

Launch = Callable[[ModuleType, torch.dtype, Sizes], None]


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _index(size: int) -> torch.Tensor:
    return _empty(size, dtype=torch.int32)


def _linear(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    x, weight = _empty(s.M, s.hidden, dtype=dtype), _empty(s.ffn, s.hidden, dtype=dtype)
    kernels.linear(x, weight)
    kernels.linear(x, weight, _empty(s.ffn, dtype=dtype))


def _linear_dx(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    kernels.linear_dx(_empty(s.M, s.ffn, dtype=dtype), _empty(s.ffn, s.hidden, dtype=dtype))


def _slice_grad(dim: str, R: int) -> Launch:
    def launch(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
        dy, x = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
        compact = _empty(s.M, R, dtype=dtype)
        kernels.slice_grad(*((dy, compact) if dim == "in" else (compact, x)), None, dim)
        kernels.slice_grad(dy, x, _index(R), dim)
        # Few tokens: no split, and the sum goes straight into the gradient.
        grad = _empty(*((s.hidden, R) if dim == "in" else (R, s.ffn)), dtype=torch.float32)
        kernels.slice_grad(dy[:64], x[:64], slice(256, 256 + R), dim, grad)

    return launch


def _swiglu(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    kernels.swiglu(_empty(s.M, s.ffn, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype))


def _swiglu_bwd(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    args = [_empty(s.M, s.ffn, dtype=dtype) for _ in range(3)]
    for index in (None, slice(0, 256), _index(256)):
        kernels.swiglu_bwd(*args, index)


def _slice_linear(op: str, dim: str, R: int) -> Launch:
    def launch(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
        delta = _empty(*((s.hidden, R) if dim == "in" else (R, s.ffn)), dtype=torch.float32)
        result, operand = _empty(s.M, s.hidden, dtype=dtype), _empty(s.M, s.ffn, dtype=dtype)
        if op == "slice_linear_dx_":
            result, operand = operand, result
        for index in (slice(0, R), _index(R)):
            getattr(kernels, op)(result, operand, delta, index, dim)

    return launch


def _slice_write(kernels: ModuleType, dtype: torch.dtype, s: Sizes) -> None:
    # Its table holds addresses, of which meta tensors have none; the sizes do not matter.
    R, odd = 16, s.hidden % 16
    weight = torch.empty((64, 64 + odd), dtype=dtype)
    shapes = [(64, R), (R, 64 + odd)]
    base = [torch.empty(shape, dtype=dtype) for shape in shapes]
    delta = [torch.empty(shape) for shape in shapes]
    for index in (slice(0, R), torch.arange(R, dtype=torch.int32)):
        kernels.slice_write([weight, weight], base, delta, [index, index], ["in", "out"])


_WIDTHS = (16, 32, 64, 256)  # each of the blocks that a slice of R channels can get

CASES: dict[str, Launch] = {
    "linear": _linear,
    "linear_dx": _linear_dx,
    # a single channel is no tensor to Triton, but the number 1
    **{f"slice_grad-{d}-{R}": _slice_grad(d, R) for d in ("in", "out") for R in (1, *_WIDTHS)},
    **{
        f"{op}-{d}-{R}": _slice_linear(op, d, R)
        for op, scattering in (("slice_linear_", "out"), ("slice_linear_dx_", "in"))
        for d in ("in", "out")
        for R in (_WIDTHS if d == scattering else (256,))
    },
    "swiglu": _swiglu,
    "swiglu_bwd": _swiglu_bwd,
    "slice_write": _slice_write,
}


@dataclass(frozen=True)
class LaunchReport:
    """One compiled launch. Spills count registers or bytes put in local memory, by the compiler."""

    kernel: str
    has_dot: bool
    registers: int
    spills: int
    shared_bytes: int
    has_matrix_instruction: bool
    has_register_wgmma: bool


def start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def launch_reports(case: str, sizes: str, dtype: torch.dtype, target: str) -> list[LaunchReport]:
    """One report for each distinct launch of a case on a target of `TARGETS`."""
    chip = TARGETS[target]
    compiled = {}
    for kernel, arguments, options in _recorded_launches(CASES[case], dtype, SIZES[sizes]):
        result = _compile(kernel, arguments, options, chip)
        compiled[result.hash] = result
    return [_report(kernel, chip) for kernel in compiled.values()]


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
        kernel.__name__
        for launch in CASES.values()
        for kernel, *_ in _recorded_launches(launch, torch.bfloat16, SIZES["7b"])
    }
    return defined - launched


def _recorded_launches(launch: Launch, dtype: torch.dtype, sizes: Sizes) -> list[tuple]:
    from triton.runtime.jit import JITFunction

    launches = []

    def record(self, *args, grid, warmup, **options):
        launches.append((self, args, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        from s2kernels import kernels

        launch(kernels, dtype, sizes)
    finally:
        JITFunction.run = run
    return launches


def _compile(kernel, arguments, options, chip: Target):
    """What JITFunction.run does between the launch and the driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    backend = make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*arguments, **options, debug=False)
    parsed, signature, constexprs, attrs = kernel._pack_args(
        backend, {**options, "debug": False}, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=gpu, options=parsed.__dict__)


def _report(compiled, chip: Target) -> LaunchReport:
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
    return LaunchReport(
        kernel=compiled.metadata.name,
        has_dot="tt.dot" in compiled.asm["ttir"],
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        has_matrix_instruction=re.search(chip.matrix_instruction, assembly) is not None,
        # One brace group holds the accumulator; a second one, the first operand in registers.
        has_register_wgmma=re.search(r"wgmma\.mma_async[^;{]*\{[^;{]*\{", assembly) is not None,
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
