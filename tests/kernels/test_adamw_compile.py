"""Gradients that moments use up build for GPUs that are not there, without spills."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytestmark = pytest.mark.slow

HALF = torch.bfloat16
# name: backend, architecture, lanes of a warp, multiprocessors, bytes of shared memory of a block
TARGETS = {
    "sm_80": ("cuda", 80, 32, 108, 163 << 10),
    "sm_90": ("cuda", 90, 32, 132, 227 << 10),
    "sm_100": ("cuda", 100, 32, 148, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 304, 64 << 10),
}
M, HIDDEN, FFN = 8192, 4096, 11008  # of LLaMA-2-7B
WIDTHS = (1, 16, 64, 256)
JOBS = [(dim, R, target) for dim in ("in", "out") for R in WIDTHS for target in TARGETS]


def start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # triton is imported after this
    torch.set_num_threads(1)


def resources(dim: str, R: int, target: str) -> list[tuple[str, int, int]]:
    """(kernel, bytes or registers spilled, bytes of shared memory) of each launch."""
    from triton.runtime.jit import JITFunction

    from s2kernels import kernels
    from s2kernels.kernels import target as hardware
    from s2kernels.moments import Moments

    launches = []

    def record(self, *args, grid, warmup, **options):
        launches.append((self, args, options))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dy, x, compact = (empty(M, size, dtype=HALF) for size in (HIDDEN, FFN, R))
    shape = (HIDDEN, R) if dim == "in" else (R, FFN)
    out = Moments(empty(*shape), empty(*shape), (0.9, 0.999))
    chip = hardware.Chip("none", target, TARGETS[target][3])
    with patch.object(JITFunction, "run", record), patch.object(hardware, "WITHOUT_GPU", chip):
        pair = (dy, compact) if dim == "in" else (compact, x)
        kernels.slice_grad(*pair, None, dim, out)
        kernels.slice_grad(dy, x, empty(R, dtype=torch.int32), dim, out)
        kernels.slice_grad(dy[:64], x[:64], slice(256, 256 + R), dim, out)  # no split
        kernels.adamw_values_(*(empty(shape[0] * shape[1]) for _ in range(3)), empty(3), 1e-8)
    return [_compiled(*launch, target) for launch in launches]


def _compiled(
    kernel: Any, arguments: tuple, options: dict[str, Any], target: str
) -> tuple[str, int, int]:
    """What JITFunction.run does between the launch and the driver, and what came of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    name, arch, warp_size, *_ = TARGETS[target]
    gpu = GPUTarget(name, arch, warp_size)
    backend = make_backend(gpu)
    options = {**options, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(
        backend, options, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    if name == "hip":
        fields = re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        spilled = sum(map(int, fields))
    else:
        spilled = _local_memory(compiled.asm["cubin"])
    return kernel.__name__, spilled, compiled.metadata.shared


def _local_memory(cubin: bytes) -> int:
    """Bytes of stack and local memory of a thread, 0 without spills."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(re.search(rf"\b{field}:(\d+)", usage)[1]) for field in ("STACK", "LOCAL"))


@pytest.fixture(scope="module")
def reports(request):
    """job -> future of its resources, for the jobs of the tests that were selected."""
    pool = ProcessPoolExecutor(
        max_workers=2, mp_context=get_context("spawn"), initializer=start_worker
    )
    items = [item for item in request.session.items if item.path == request.path]
    selected = [item.callspec.params["job"] for item in items]
    yield {job: pool.submit(resources, *job) for job in selected}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job)))
def test_it_builds_without_spills(reports, job):
    launches = reports[job].result()
    names = [name for name, _, _ in launches]
    assert names.count("_slice_grad_kernel") == 3 and names.count("_adamw_values_kernel") == 1
    # elsewhere there are tiles enough for all multiprocessors, and no partial sums
    assert "_reduce_kernel" in names or job[:2] in [("in", 256), ("out", job[1])]
    for launch in launches:
        _, spilled, shared = launch
        assert spilled == 0 and shared <= TARGETS[job[2]][4], launch
