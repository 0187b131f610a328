"""Every kernel with every committed launch configuration builds for GPUs that are not there."""

import importlib
import pkgutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from bench.kernels import compile
from bench.kernels.chips import TARGETS
from bench.kernels.ops import CASES

pytestmark = pytest.mark.slow

HALF = (torch.bfloat16, torch.float16)
# fp16 shares its launch parameters with bf16 and differs by one word of the instructions: one chip.
MODEL_JOBS = [
    (case, "7b", dtype, target)
    for case in CASES
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for target in TARGETS
    if dtype != torch.float16 or target == "sm_90"
]
RAGGED_JOBS = [(case, "ragged", torch.bfloat16, "sm_90") for case in CASES]


def uncovered_kernels() -> set[str]:
    """The kernels of the package that no case launches."""
    from triton.runtime.jit import JITFunction

    from s2kernels import kernels

    defined = {
        name
        for module in pkgutil.iter_modules(kernels.__path__, "s2kernels.kernels.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    return defined - {
        launch.kernel.__name__
        for case in CASES
        for target in TARGETS
        for launch in compile.recorded((case, "7b", torch.bfloat16, target))
    }


@pytest.fixture(scope="module")
def reports(request):
    """job -> future of its reports, for the jobs of the tests that were selected."""
    # Fresh processes: triton is compiling in them and interpreting in this one, for good.
    pool = ProcessPoolExecutor(
        max_workers=2, mp_context=get_context("spawn"), initializer=compile.start_worker
    )
    selected = [
        item.callspec.params["job"]
        for item in request.session.items
        if item.path == request.path and "job" in getattr(item, "fixturenames", ())
    ]
    futures = {job: pool.submit(compile.rows_of, job) for job in selected}
    futures["uncovered"] = pool.submit(uncovered_kernels)
    yield futures
    pool.shutdown(cancel_futures=True)


def _name(job) -> str:
    case, _, dtype, target = job
    return f"{case}-{str(dtype).removeprefix('torch.')}-{target}"


def _check(reports, job) -> list[dict]:
    _, _, dtype, target = job
    launches = reports[job].result()
    assert launches
    for launch in launches:
        assert launch["shared_bytes"] <= TARGETS[target].shared_bytes, launch
        # In fp32 input_precision is "ieee", which NVIDIA's tensor cores do not have.
        if launch["dot"] and dtype in HALF:
            assert launch["matrix_instruction"], launch
        # ptxas 12.9 lets registers be reused before an asynchronous wgmma has read its first
        # operand from them (triton#11781): ours come from shared memory.
        assert not launch["register_wgmma"], launch
    return launches


@pytest.mark.parametrize("job", MODEL_JOBS, ids=_name)
def test_launch_at_model_shapes(reports, job):
    for launch in _check(reports, job):
        assert launch["spills"] == 0, launch


@pytest.mark.parametrize("job", [job for job in MODEL_JOBS if job[0] == "slice_write"], ids=_name)
def test_aligned_slices_are_written_by_16_bytes(reports, job):
    """Nothing but the table tells the kernel of the alignment."""
    assert all(launch["wide_store"] for launch in _check(reports, job))


@pytest.mark.parametrize("job", RAGGED_JOBS, ids=_name)
def test_launch_without_alignment(reports, job):
    """Sizes that nothing divides are served, not tuned for: addresses may spill there."""
    _check(reports, job)


def test_every_kernel_has_a_case(reports):
    # tests/serve/test_grouped_compile.py compiles those of many adapters
    assert reports["uncovered"].result() == {"_grouped_in_kernel", "_grouped_out_kernel"}
