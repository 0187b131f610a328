"""Steps at toy size: what is measured of them, what must be caught, and how a run goes on."""

import json
import time
from dataclasses import replace

import pytest
import torch

from bench.measure import timing
from bench.methods import METHODS, Unavailable, comparable
from bench.methods.adapters import LoRA
from bench.steps import bench_steps, cases, step
from bench.steps.cases import Case
from bench.steps.model_shapes import TABLE

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Benchmark:
    """As much of pytest-benchmark's fixture as a case uses."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.disabled = False
        self.rounds = 0

    def pedantic(self, target, setup, teardown, rounds) -> None:
        for _ in range(rounds):
            args, kwargs = setup()
            target(*args, **kwargs)
            teardown(*args, **kwargs)
        self.rounds = rounds


def toy_case(method: str, **other) -> Case:
    sizes = {"shape": TABLE["toy"], "batch": 2, "length": 8, "dtype": "float32"}
    return Case(suites=("figure5",), method=method, **sizes | other)


def budget(case: Case):
    return comparable(case.shape.config(case.length), share=case.share)


def measured(case: Case) -> dict:
    """The extra_info of a case."""
    benchmark = Benchmark()
    bench_steps.measure(benchmark, case, CPU, seconds=0.0)
    return benchmark.extra_info


@pytest.mark.parametrize("method", ["lora", "s2ft_inplace", "s2ft_permuted_additive"])
def test_what_is_known_of_a_case(method):
    extra = measured(toy_case(method))
    sizes, seconds = extra["bytes"], extra["seconds"]
    assert extra["status"] == "measured" and extra["paired"] is True
    assert extra["total_parameters"] == TABLE["toy"].parameters()
    ratio, floor = extra["ratio_to_floor"], extra["floor_seconds"]
    assert len(ratio["data"]) == len(floor["data"]) == bench_steps.ROUNDS[0]
    assert ratio["q1"] <= ratio["median"] <= ratio["q3"] and floor["median"] > 0
    assert seconds["periodic"] == 0 < min(seconds[p] for p in ("forward", "backward", "optimizer"))

    weights = TABLE["toy"].parameters() * 4
    assert sizes["gradients"] == extra["trained_parameters"] * 4
    assert 2 * sizes["gradients"] <= sizes["optimizer"] < 2 * sizes["gradients"] + 200
    assert weights + sizes["gradients"] <= sizes["weights"] < 1.3 * weights + sizes["gradients"]
    held = sizes["weights"] + sizes["optimizer"] + max(sizes["saved"], sizes["gradients"])
    assert sizes["peak"] == held + sizes["temporaries"] and sizes["temporaries"] >= 0
    # The first step has no states while the activations are alive.
    assert sizes["peak"] - sizes["optimizer"] <= sizes["first_step_peak"] <= sizes["peak"]
    assert sizes["unseen"] == 0


def test_the_floor_beside_itself_trains_nothing():
    extra = measured(toy_case("frozen"))
    assert extra["trained_parameters"] == 0
    assert extra["bytes"]["gradients"] == extra["bytes"]["optimizer"] == 0
    assert extra["bytes"]["weights"] == TABLE["toy"].parameters() * 4 + 64  # rotary frequencies


def test_more_layers_keep_more_and_checkpoints_less():
    def saved(case):
        return step.count(case, budget(case), CPU)["bytes"]["saved"]

    whole = toy_case("s2ft_inplace")
    cut = replace(whole, shape=whole.shape.cut(1))
    assert saved(cut) < saved(whole)
    assert saved(replace(whole, options=cases.CHECKPOINTING)) < saved(whole)
    assert saved(replace(whole, options=cases.FULL_DEPTH)) > saved(whole)


def test_rounds_with_the_floor_first_and_last_take_turns(monkeypatch):
    order, real = [], step.laps

    def laps(method, batch, device):
        order.append((method.name, batch.sum().item()))
        return real(method, batch, device)

    monkeypatch.setattr(step, "laps", laps)
    measured(toy_case("lora"))
    timed = order[2 * bench_steps.WARM_UP :]
    pairs = [timed[start : start + 2] for start in range(0, len(timed), 2)]
    assert [pair[0][0] for pair in pairs] == ["frozen", "lora"] * (len(pairs) // 2)
    assert all({name for name, _ in pair} == {"frozen", "lora"} for pair in pairs)
    assert all(first[1] == second[1] for first, second in pairs)  # on one batch


def test_periodic_work_is_a_share_of_every_step(monkeypatch):
    class Pauses(LoRA):
        period = 4
        due = False

        def make_due(self):
            self.due = True

        def update(self):
            super().update()
            if self.due:
                time.sleep(0.4)
            self.due = False

    monkeypatch.setitem(METHODS, "lora", Pauses)
    monkeypatch.setattr(step, "PERIODIC_STEPS", 3)
    extra = measured(toy_case("lora"))
    assert 0.09 < extra["seconds"]["periodic"] < 0.2
    floors, ratios = (extra[name]["data"] for name in ("floor_seconds", "ratio_to_floor"))
    in_floors = [ratio * floor for ratio, floor in zip(ratios, floors, strict=True)]
    assert min(in_floors) > extra["seconds"]["periodic"]


@pytest.mark.parametrize("name, each", [("lisa", 0.1), ("spiel", 0.3)])
def test_steps_with_periodic_work_are_not_timed(monkeypatch, name, each):
    """In 60 steps LISA draws thrice, and SpIEL watches gradients in 6 steps of 20."""
    due, timed, real = [], [], step.laps

    def laps(method, batch, device):
        if method.name == name:
            timed.append(method.is_due())
        return real(method, batch, device)

    class Noted(METHODS[name]):
        def step(self, batch):
            due.append(self.is_due())
            return super().step(batch)

    monkeypatch.setattr(step, "laps", laps)
    monkeypatch.setattr(bench_steps, "ROUNDS", (40, 40))
    monkeypatch.setattr(step, "PERIODIC_SECONDS", float("inf"))  # on a busy machine, too
    monkeypatch.setitem(METHODS, name, Noted)
    monkeypatch.setattr(step, "count", lambda *others: {"bytes": {"peak": 0}})
    measured(toy_case(name))
    of_rounds = timed[bench_steps.WARM_UP : bench_steps.WARM_UP + 40]
    assert not any(of_rounds) and len(of_rounds) == 40
    assert all(due) and each * 40 <= len(due) <= 2 * each * 40
    assert timed[bench_steps.WARM_UP + 40 :] == [True] * step.PERIODIC_STEPS


class WithoutUpdate(LoRA):
    def update(self):
        pass


class WithoutB(LoRA):
    def make_optimizer(self, lr):
        a = [p for name, p in self.named_trained() if "lora_A" in name]
        return torch.optim.AdamW(a, lr=lr)


class WithoutParameters(LoRA):
    def attach(self, model):
        return super().attach(model).requires_grad_(False)

    def make_optimizer(self, lr):
        return None


@pytest.mark.parametrize(
    "method, words",
    [
        (WithoutUpdate, "lora trains 0 of its 28 parameters"),
        (WithoutB, "lora trains 14 of its 28 parameters"),
        (WithoutParameters, "lora trains nothing"),
    ],
)
def test_a_method_that_does_not_train_is_caught(monkeypatch, method, words):
    monkeypatch.setitem(METHODS, "lora", method)
    with pytest.raises(step.WrongMethod, match=words):
        measured(toy_case("lora"))


def test_a_leaked_full_activation_is_caught(monkeypatch):
    """The trap of the method: the slice of x saved as a view, which pins all of x."""

    class Permuted(METHODS["s2ft_permuted_inplace"]):
        fuse = False  # fused, the FFN keeps no slice

    monkeypatch.setitem(METHODS, "s2ft_unfused", Permuted)
    case = toy_case("s2ft_unfused", share=0.01)  # a few of the channels
    before = step.count(case, budget(case), CPU)["bytes"]["saved"]
    monkeypatch.setattr("s2kernels.autograd.linear.take", lambda x, where: x[:, where])
    after = step.count(case, budget(case), CPU)["bytes"]["saved"]
    # 16 tokens; the channels of the FFN in both layers, and of attention where a head is trained
    assert after - before > 16 * 2 * 100 * 4


def test_out_of_memory_and_unavailable_are_results(monkeypatch):
    def check(self, options):
        raise Unavailable("nowhere-torch is not installed")

    benchmark = Benchmark()
    monkeypatch.setattr(METHODS["lora"], "check", check)
    with pytest.raises(pytest.skip.Exception):
        bench_steps.measure(benchmark, toy_case("lora"), CPU, 0.0)
    assert benchmark.extra_info["status"] == "unavailable: nowhere-torch is not installed"

    def count(*others):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(step, "count", count)
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        bench_steps.measure(benchmark, toy_case("full"), CPU, 0.0)
    assert benchmark.extra_info["status"] == "out of memory" and benchmark.rounds == 0


def test_two_models_that_do_not_fit_together_are_timed_apart(monkeypatch):
    monkeypatch.setattr(bench_steps, "fit_together", lambda peak, device: False)
    order, real = [], step.laps

    def laps(method, batch, device):
        order.append(method.name)
        return real(method, batch, device)

    monkeypatch.setattr(step, "laps", laps)
    extra = measured(toy_case("lora"))
    each = bench_steps.WARM_UP + bench_steps.ROUNDS[0]
    assert order == ["frozen"] * each + ["lora"] * each
    assert extra["paired"] is False and extra["ratio_to_floor"]["median"] > 0


# The harness as a command


@pytest.fixture
def run(run_pytest):
    """Runs `pytest bench/steps`; returns the exit status and what it said."""
    return lambda *arguments: run_pytest("bench/steps", *arguments)


def test_a_run_goes_on_where_it_was_stopped(run, tmp_path):
    """And pytest-benchmark's own file of the same run says the same."""
    path, own = tmp_path / "cpu" / "steps.json", tmp_path / "own.json"
    toy = ["--suite", "toy", "--results", str(tmp_path), f"--benchmark-json={own}", "-k"]
    status, said = run(*toy, "2x8 and not (lora or full)")
    assert status == 0, said
    first = json.loads(path.read_text())["benchmarks"]
    names = ["toy/2x8/float32/frozen", "toy/2x8/float32/s2ft_inplace"]
    assert [entry["params"]["method"] for entry in first] == ["frozen", "s2ft_inplace"]
    assert [entry["name"] for entry in first] == [f"bench_step[{name}]" for name in names]
    for entry, theirs in zip(first, json.loads(own.read_text())["benchmarks"], strict=True):
        assert theirs["extra_info"]["ratio_to_floor"] == entry["extra_info"]["ratio_to_floor"]
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == bench_steps.ROUNDS[0]
        assert entry["params"]["floor"] == names[0]

    _, said = run(*toy, "2x8 and not full")
    assert "1 passed" in said and "2 results are there already" in said
    second = json.loads(path.read_text())["benchmarks"]
    assert second[:2] == first and second[2]["params"]["method"] == "lora"
    assert all(name in said for name in names)  # the table has all of them
    status, said = run(*toy, "2x8 and not full")
    assert status == 0 and "3 results are there already" in said


def test_disabled_benchmarks_take_one_toy_step_each(run, tmp_path):
    status, said = run("--benchmark-disable", "-k", "2x8 and not full", "--results", str(tmp_path))
    assert status == 0 and "3 passed" in said
    assert not list(tmp_path.iterdir())


def test_laps_of_a_step_are_its_four_parts():
    case = toy_case("lora")
    method = step.build(case, budget(case), CPU, 1e-3)
    laps = step.laps(method, next(step.random_batches(case, CPU)), CPU)
    assert len(laps) == 4 and min(laps) > 0
    assert timing.quartiles(laps)["data"] == laps
