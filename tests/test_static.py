"""What the compiler says of the kernels: the committed table, its gates and how it is made."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from bench import static
from bench.compiler import TARGETS, LaunchReport
from bench.launches import CASES
from bench.work import Work

TRITON = version("triton")
COMMITTED = json.loads(static.OUTPUT.read_text(encoding="utf-8"))
KERNELS = COMMITTED["kernels"]
# Those that the tensor copy engine of Hopper and Blackwell is there for.
BY_DESCRIPTORS = {"_linear_descriptor_kernel", "_linear_dx_swiglu_bwd_kernel"}

REPORT = LaunchReport(
    kernel="k",
    launch={},
    grid=(1,),
    work=Work(bytes=4300, flops=10**9),
    has_dot=True,
    num_warps=8,
    registers=32,
    spills=0,
    shared_bytes=0,
    tensor_memory_columns=0,
    has_matrix_instruction=True,
    has_register_wgmma=False,
    has_tensor_copy=False,
)


def _name(kernel: dict) -> str:
    return " ".join(str(kernel[key]) for key in ("case", "dtype", "target", "kernel"))


def test_every_case_is_listed_for_every_chip():
    listed = {(kernel["case"], kernel["dtype"], kernel["target"]) for kernel in KERNELS}
    wanted = {
        (case, str(dtype).removeprefix("torch."), target) for case, dtype, target in static.JOBS
    }
    assert listed == wanted, "make the table again: python -m bench.static"
    assert {case for case, *_ in listed} == CASES.keys()


def test_nothing_spills():
    assert [_name(kernel) for kernel in KERNELS if kernel["spills"]] == []


def test_every_kernel_fits():
    for kernel in KERNELS:
        assert kernel["shared_bytes"] <= TARGETS[kernel["target"]].shared_bytes, _name(kernel)
        assert kernel["blocks_per_sm"] >= 1, _name(kernel)


def test_products_run_on_the_tensor_cores():
    products = [kernel for kernel in KERNELS if kernel["dot"] and kernel["dtype"] == "bfloat16"]
    assert products
    assert [_name(kernel) for kernel in products if not kernel["matrix_instruction"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_dense_products_move_tiles_by_descriptors(target):
    half = [k for k in KERNELS if k["target"] == target and k["dtype"] == "bfloat16"]
    moved = {kernel["kernel"] for kernel in half if kernel["tensor_copy"]}
    dense = {kernel["kernel"] for kernel in half if kernel["case"] in ("linear", "linear_dx")}
    if target in ("sm_90", "sm_100"):
        assert moved >= BY_DESCRIPTORS
        assert dense <= BY_DESCRIPTORS
    else:
        assert not moved
        assert dense == {"_linear_kernel"}


def test_a_product_is_bound_by_flops_and_one_token_by_bytes():
    M, K, N = (COMMITTED["sizes"][name] for name in ("M", "hidden", "ffn"))
    dense = [k for k in KERNELS if k["case"] in ("linear", "linear_dx") and "floor_us" in k]
    bounds = {(kernel["flops"], kernel["floor_by"]) for kernel in dense}
    assert bounds == {(2 * M * N * K, "flops"), (2 * N * K, "bytes")}
    for kernel in dense:
        seconds = {"flops": kernel["flops"] / 790e12, "bytes": kernel["bytes"] / 4.3e12}
        assert kernel["floor_us"] == pytest.approx(max(seconds.values()) * 1e6, abs=0.01)


def test_bytes_of_swiglu():
    sizes = COMMITTED["sizes"]
    (forward,) = [k for k in KERNELS if k["case"] == "swiglu" and "floor_us" in k]
    assert forward["bytes"] == 3 * 2 * sizes["M"] * sizes["ffn"]
    assert forward["floor_us"] == pytest.approx(forward["bytes"] / 4.3e12 * 1e6, abs=0.01)


@pytest.mark.skipif(TRITON != COMMITTED["triton"], reason="the table is of another triton")
def test_table_is_of_the_kernels_as_they_are():
    """Launches of all, and what the compiler makes of a few."""
    assert static.differences(static.OUTPUT) == [], "make it again: python -m bench.static"


def test_differences_are_told(tmp_path, monkeypatch):
    row = static.row("linear", torch.bfloat16, "sm_90", REPORT)
    path = tmp_path / "kernels.json"

    def differences(launch, report, triton=TRITON):
        path.write_text(static.dumps({"triton": triton, "kernels": [row]}))
        monkeypatch.setattr(
            static,
            "compiled",
            lambda function, jobs, workers: [
                (("linear", torch.bfloat16, "sm_90"), [launch])
                if function is static.compiler.launches_of
                else (("linear", torch.bfloat16, "sm_90"), [report])
            ],
        )
        return static.differences(path)

    assert differences(("k", {}), REPORT) == []
    assert static.main(["--check", "--output", str(path)]) == 0
    gone, new = differences(("k", {"BLOCK": 2}), REPORT)
    assert gone.startswith("no longer launched") and '{"BLOCK": 2}' in new
    (changed,) = differences(("k", {}), replace(REPORT, registers=33))
    assert '"registers": 33' in changed
    assert static.main(["--check", "--output", str(path)]) == 1
    assert "triton 0" in differences(("k", {}), REPORT, triton="0")[0]


def test_written_as_it_is_read():
    assert static.dumps(COMMITTED) == static.OUTPUT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "changes", "blocks", "limit"),
    [
        ("sm_90", {}, 8, "warps, registers"),
        ("sm_90", {"registers": 33}, 6, "registers"),
        ("sm_90", {"registers": 128}, 2, "registers"),
        ("sm_90", {"registers": 255}, 1, "registers"),
        ("sm_90", {"num_warps": 1}, 32, "blocks"),
        ("sm_90", {"shared_bytes": 100 * 1024}, 2, "shared memory"),
        ("sm_80", {"shared_bytes": 100 * 1024}, 1, "shared memory"),
        ("sm_100", {"tensor_memory_columns": 256}, 2, "tensor memory"),
        ("gfx942", {"num_warps": 4, "registers": 128}, 4, "registers"),
        ("gfx942", {"num_warps": 4, "shared_bytes": 32 * 1024}, 2, "shared memory"),
    ],
)
def test_occupancy(target, changes, blocks, limit):
    assert static.occupancy(replace(REPORT, **changes), TARGETS[target]) == (blocks, limit)


def test_floor_is_of_the_h200_in_bf16_alone():
    row = static.row("c", torch.bfloat16, "sm_90", REPORT)
    assert (row["floor_us"], row["floor_by"]) == (1.27, "flops")
    row = static.row("c", torch.bfloat16, "sm_90", replace(REPORT, has_dot=False))
    assert (row["floor_us"], row["floor_by"]) == (0.0, "bytes")
    for dtype, target in ((torch.float32, "sm_90"), (torch.bfloat16, "sm_80")):
        assert "floor_us" not in static.row("c", dtype, target, REPORT)
    assert "bytes" not in static.row("c", torch.bfloat16, "sm_90", replace(REPORT, work=None))
