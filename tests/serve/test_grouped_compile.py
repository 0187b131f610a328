"""What the compiler says of the grouped kernels, in each regime, for each chip and dtype."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from bench.kernels import compile, ops
from bench.kernels.chips import TARGETS
from bench.steps import work
from s2kernels import kernels
from s2kernels.groups import BLOCKS, make_groups

pytestmark = pytest.mark.slow

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Sizes of LLaMA-2-7B in all of them; without any alignment, which makes other code, in one chip.
JOBS = [("7b", block, dtype, target) for block in BLOCKS for dtype in DTYPES for target in TARGETS]
JOBS += [("ragged", block, dtype, "sm_90") for block in BLOCKS for dtype in DTYPES]
KERNELS = {"_grouped_in_kernel", "_grouped_out_kernel"}


def _launch(block):
    """An in-slice of down_proj and an out-slice of up_proj, 220 channels each."""

    def launch(dtype, sizes):
        group = torch.zeros(block, dtype=torch.int64)
        groups = make_groups(group, [range(220)], [range(220)])
        assert groups.tokens.block == block
        meta = replace(
            groups,
            tokens=replace(
                groups.tokens,
                order=groups.tokens.order.to("meta"),
                tiles=groups.tokens.tiles.to("meta"),
            ),
            **{name: getattr(groups, name).to("meta") for name in ("bounds", "rows", "channels")},
        )

        def empty(*shape):
            return torch.empty(shape, dtype=dtype, device="meta")

        wide, narrow = empty(sizes.m, sizes.k), empty(sizes.m, sizes.n)
        pool = empty(10**5, sizes.n)
        kernels.grouped_in_(narrow, wide, pool, meta)
        kernels.grouped_out_(wide, narrow, pool, meta)

    return launch


def reports_of(sizes, block, dtype, target):
    ops.CASES["grouped"] = ops.Case("grouped", lambda o, s: [(o.dtype, s)], launch=_launch(block))
    work.OPS["grouped"] = lambda *arguments: work.Work(0, 0)
    return compile.rows_of(("grouped", sizes, dtype, target))


@pytest.fixture(scope="module")
def reports():
    # Other processes: in this one triton may be interpreting.
    with ProcessPoolExecutor(
        max_workers=2, mp_context=get_context("spawn"), initializer=compile.start_worker
    ) as pool:
        futures = {job: pool.submit(reports_of, *job) for job in JOBS}
        return {job: future.result() for job, future in futures.items()}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job)))
def test_compiles(reports, job):
    _, block, dtype, target = job
    found = reports[job]
    assert {report["kernel"] for report in found} == KERNELS
    for report in found:
        assert report["spills"] == 0, report
        assert report["shared_bytes"] <= TARGETS[target].shared_bytes, report
        assert report["dot"] == (block > 1)
        assert not report["register_wgmma"], report  # see tests/bench/test_compile.py
        # 16 tokens are too few for the instructions that are new in Hopper and Blackwell: they get
        # those of Ampere.
        new = target in ("sm_90", "sm_100")
        if report["dot"] and dtype != torch.float32 and not (new and block == 16):
            assert report["matrix_instruction"], report
