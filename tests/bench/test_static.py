"""What the compiler says of the kernels: the committed table, its gates and how it is made."""

import json
from importlib.metadata import version

import pytest

from bench.kernels import compile
from bench.kernels.chips import TARGETS, occupancy
from bench.kernels.ops import CASES
from bench.steps.work import Work

TRITON = version("triton")
COMMITTED = json.loads(compile.OUTPUT.read_text(encoding="utf-8"))
OLDEST = json.loads(compile.OUTPUT.with_name("kernels-3.6.json").read_text(encoding="utf-8"))
KERNELS = COMMITTED["kernels"]
# Those that the tensor copy engine of Hopper and Blackwell is there for.
BY_DESCRIPTORS = {"_linear_descriptor_kernel", "_linear_dx_swiglu_bwd_kernel"}

LINE = {"case": "linear", "dtype": "bfloat16", "target": "sm_90", "kernel": "k", "launch": {}}
ROW = {
    **LINE,
    "registers": 32,
    "shared_bytes": 0,
    "tensor_memory_columns": 0,
    "warps": 8,
    "dot": True,
}


def _name(kernel: dict) -> str:
    return " ".join(str(kernel[key]) for key in ("case", "dtype", "target", "kernel"))


def test_every_case_is_listed_for_every_chip():
    listed = {(kernel["case"], kernel["dtype"], kernel["target"]) for kernel in KERNELS}
    wanted = {
        (case, str(dtype).removeprefix("torch."), target)
        for case, _, dtype, target in compile.jobs()
    }
    assert listed == wanted, "make the table again: python -m bench.kernels.compile"
    assert {case for case, *_ in listed} == CASES.keys()


def test_the_oldest_triton_launches_the_same():
    def lines(kernels):
        names = ("case", "dtype", "target", "kernel", "launch", "grid")
        return {json.dumps([kernel[name] for name in names]) for kernel in kernels}

    assert (OLDEST["triton"], OLDEST["sizes"]) == ("3.6.0", COMMITTED["sizes"])
    assert lines(OLDEST["kernels"]) == lines(KERNELS)


@pytest.mark.parametrize(
    ("kernels", "known"),
    [
        (KERNELS, []),
        # of each thread, 3.6.0 puts 16 bytes into local memory here
        (OLDEST["kernels"], ["slice_grad_each-in-16 bfloat16 sm_80 _slice_grad_each_kernel"]),
    ],
    ids=[TRITON, "3.6.0"],
)
def test_nothing_spills(kernels, known):
    assert [_name(kernel) for kernel in kernels if kernel["spills"]] == known


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
    M, K, N = (COMMITTED["sizes"][name] for name in "mkn")
    dense = [k for k in KERNELS if k["case"] in ("linear", "linear_dx") and "floor_us" in k]
    bounds = {(kernel["flops"], kernel["floor_by"]) for kernel in dense}
    assert bounds == {(2 * M * N * K, "flops"), (2 * N * K, "bytes")}
    for kernel in dense:
        seconds = {"flops": kernel["flops"] / 790e12, "bytes": kernel["bytes"] / 4.3e12}
        assert kernel["floor_us"] == pytest.approx(max(seconds.values()) * 1e6, abs=0.01)


def test_bytes_of_swiglu():
    sizes = COMMITTED["sizes"]
    (forward,) = [k for k in KERNELS if k["case"] == "swiglu" and "floor_us" in k]
    assert forward["bytes"] == 3 * 2 * sizes["m"] * sizes["k"]
    assert forward["floor_us"] == pytest.approx(forward["bytes"] / 4.3e12 * 1e6, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(TRITON != COMMITTED["triton"], reason="the table is of another triton")
def test_table_is_of_the_kernels_as_they_are():
    """Launches of all, and what the compiler makes of a few."""
    assert compile.differences(compile.OUTPUT) == [], "make it again: make static"


def test_differences_are_told(tmp_path, monkeypatch):
    row = ROW | {"spills": 0}
    path = tmp_path / "kernels.json"

    def differences(launch, found, triton=TRITON):
        path.write_text(compile.dumps({"triton": triton, "kernels": [row]}))
        launched = LINE | {"launch": launch}
        monkeypatch.setattr(
            compile,
            "collected",
            lambda function, jobs, workers: [
                launched if function is compile.launches_of else found
            ],
        )
        return compile.differences(path)

    assert differences({}, row) == []
    assert compile.main(["--check", "--output", str(path)]) == 0
    gone, new = differences({"BLOCK": 2}, row)
    assert gone.startswith("no longer launched") and "BLOCK" in new
    (changed,) = differences({}, row | {"registers": 33})
    assert '"registers": 33' in changed
    assert compile.main(["--check", "--output", str(path)]) == 1
    assert "triton 0" in differences({}, row, triton="0")[0]


def test_written_as_it_is_read():
    assert compile.dumps(COMMITTED) == compile.OUTPUT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "changes", "blocks", "limit"),
    [
        ("sm_90", {}, 8, "warps, registers"),
        ("sm_90", {"registers": 33}, 6, "registers"),
        ("sm_90", {"registers": 128}, 2, "registers"),
        ("sm_90", {"registers": 255}, 1, "registers"),
        ("sm_90", {"warps": 1}, 32, "blocks"),
        ("sm_90", {"shared_bytes": 100 * 1024}, 2, "shared memory"),
        ("sm_80", {"shared_bytes": 100 * 1024}, 1, "shared memory"),
        ("sm_100", {"tensor_memory_columns": 256}, 2, "tensor memory"),
        ("gfx942", {"warps": 4, "registers": 128}, 4, "registers"),
        ("gfx942", {"warps": 4, "shared_bytes": 32 * 1024}, 2, "shared memory"),
    ],
)
def test_occupancy(target, changes, blocks, limit):
    found = occupancy(ROW | changes, TARGETS[target])
    assert (found["blocks_per_sm"], found["limited_by"]) == (blocks, limit)
    assert found["occupancy"] == round(
        blocks * (ROW | changes)["warps"] / TARGETS[target].warps_sm, 3
    )


def test_floor_is_of_the_h200_in_bf16_alone():
    work = Work(bytes=4300, flops=10**9)
    found = compile.floor(ROW, work)
    assert (found["floor_us"], found["floor_by"]) == (1.27, "flops")
    found = compile.floor(ROW | {"dot": False}, work)
    assert (found["floor_us"], found["floor_by"]) == (0.0, "bytes")
    for changed in ({"dtype": "float32"}, {"target": "sm_80"}):
        assert compile.floor(ROW | changed, work) == {"bytes": 4300, "flops": 10**9}
