"""The laboratory at toy size: what it measures, what it must catch, and how it is stopped."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from toy_cases import CEILINGS, fake_entry, measure_at_once, toy_case

from bench import (
    cases,
    ceilings,
    compare,
    estimate,
    fresh,
    host,
    laboratory,
    measure,
    report,
    rounds,
    timing,
    visits,
)
from bench.activations import not_covered
from bench.cases import PLAIN
from bench.methods import METHODS, Unavailable
from bench.methods.adapters import LoRA
from bench.record import Record
from bench.steps.model_shapes import TABLE
from s2kernels import reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Toy operations are too small to share: threads of a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)


def setup(rounds: int = 2) -> fresh.Setup:
    precision = timing.Precision(error=1.0, min_rounds=rounds, max_rounds=rounds)
    return fresh.Setup(CPU, precision, CEILINGS)


def run_main(folder, *arguments: str) -> int:
    return laboratory.main(
        ["--device", "cpu", "--suite", "toy", "--results", str(folder), *arguments]
    )


def written(folder) -> dict[str, dict]:
    """Entries of the file by the id of their case; none where there is no file."""
    path = folder / "cpu" / "steps.json"
    entries = json.loads(path.read_text())["benchmarks"] if path.is_file() else []
    return {entry["name"]: entry for entry in entries}


# What is measured


@pytest.mark.parametrize("method", ["lora", "s2ft_inplace"])
def test_entry_of_a_method(method):
    case = toy_case(method)
    entry = measure.measure(case, setup(3))
    extra, sizes = entry["extra_info"], entry["extra_info"]["bytes"]
    assert (entry["group"], entry["name"]) == ("figure5", f"figure5/toy/2x8/float32/{method}")
    assert entry["params"]["tokens"] == 16 and entry["params"]["options"]["attention"] == "sdpa"
    assert extra["status"] == "measured" and extra["paired"] is True
    assert entry["stats"]["rounds"] == len(extra["ratio_to_floor"]["data"]) == 3
    assert extra["tokens_per_second"] == pytest.approx(16 / entry["stats"]["median"])
    assert set(extra["seconds"]) == {"forward", "backward", "optimizer", "periodic"}
    assert extra["seconds"]["periodic"] == 0 < min(extra["seconds"][p] for p in visits.PARTS)
    assert sum(extra["seconds"].values()) < 2 * entry["stats"]["max"]

    weights = TABLE["toy"].parameters() * 4
    assert sizes["gradients"] == extra["trained_parameters"] * 4
    assert 2 * sizes["gradients"] <= sizes["optimizer"] < 2 * sizes["gradients"] + 200
    assert weights + sizes["gradients"] <= sizes["weights"] < 1.3 * weights + sizes["gradients"]
    held = sizes["weights"] + sizes["optimizer"] + max(sizes["saved"], sizes["gradients"])
    assert sizes["peak"] == held + sizes["temporaries"] and sizes["temporaries"] >= 0
    # The first step has no states while the activations are alive.
    assert sizes["peak"] - sizes["optimizer"] <= sizes["first_step_peak"] <= sizes["peak"]
    assert sizes["unseen"] == 0 and extra["launches"] is None
    assert extra["model"]["saved"] == sizes["saved"]
    assert extra["ops"] > 100


def test_what_is_not_timed_is_counted(tmp_path, monkeypatch, capsys):
    name = "density/toy/2x8/float32/spiel/1.00%"
    assert run_main(tmp_path / "before", "--only", name) == 0
    (entry,) = written(tmp_path / "before").values()
    extra = entry["extra_info"]
    assert entry["stats"] is None and extra["status"] == "measured" and extra["bytes"]["peak"] > 0
    assert "ratio_to_floor" not in extra and entry["params"]["timed"] is False
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith(f"{name}  "))
    assert line.split()[2:9] == ["-"] * 7 and float(line.split()[9]) > 0

    counted = measure.count

    def leaking(*arguments):
        found = counted(*arguments)
        return found | {"bytes": found["bytes"] | {"saved": found["bytes"]["saved"] + 8}}

    monkeypatch.setattr(measure, "count", leaking)
    run_main(tmp_path / "after", "--only", name)
    assert compare.main(files(tmp_path)) == 1
    assert f"LOSS  {name}: saved" in capsys.readouterr().out


def test_the_floor_beside_itself_trains_nothing():
    extra = measure.measure(toy_case("frozen"), setup())["extra_info"]
    assert extra["trained_parameters"] == 0
    assert extra["bytes"]["gradients"] == extra["bytes"]["optimizer"] == 0
    assert extra["bytes"]["weights"] == TABLE["toy"].parameters() * 4 + 64  # rotary frequencies
    assert extra["paired"] is True


def test_more_layers_keep_more_and_checkpoints_less():
    def saved(case):
        return measure.count(case, budget(case), CPU)["bytes"]["saved"]

    whole = toy_case("s2ft_inplace")
    cut = replace(whole, shape=whole.shape.cut(1))
    assert saved(cut) < saved(whole)
    assert saved(replace(whole, options=cases.CHECKPOINTING)) < saved(whole)
    assert saved(replace(whole, options=cases.FULL_DEPTH)) > saved(whole)


def budget(case):
    return measure.comparable(case.shape.config(case.length), share=case.share)


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
    monkeypatch.setattr(rounds, "PERIODIC_STEPS", 3)
    (run,) = rounds.time_rounds([toy_case("lora")], budget(toy_case("lora")), setup())
    assert 0.09 < run.periodic < 0.2
    visit = visits.Visit(run.laps, [1.0] * len(run.laps), run.periodic, paired=False, took=1.0)
    assert min(visit.seconds) > run.periodic


@pytest.mark.parametrize("name, each", [("lisa", 0.1), ("spiel", 0.3)])
def test_steps_with_periodic_work_are_not_timed(monkeypatch, name, each):
    """In 60 steps LISA draws thrice, and SpIEL watches gradients in 6 steps of 20."""
    if name not in METHODS:
        pytest.skip(f"{name} is not registered")
    due, timed, real = [], [], rounds.step_laps

    def step_laps(method, batch, device):
        timed.append(method.is_due())
        return real(method, batch, device)

    class Noted(METHODS[name]):
        def step(self, batch):
            due.append(self.is_due())
            return super().step(batch)

    monkeypatch.setattr(rounds, "step_laps", step_laps)
    monkeypatch.setitem(METHODS, name, Noted)
    case = toy_case(name)
    (run,) = rounds.time_rounds([case], budget(case), setup(40))
    of_rounds = timed[rounds.WARM_UP : rounds.WARM_UP + 40]
    assert not any(of_rounds) and len(run.laps) == 40
    assert all(due) and each * 40 <= len(due) <= 2 * each * 40
    assert timed[rounds.WARM_UP + 40 :] == [True] * rounds.PERIODIC_STEPS


@pytest.mark.parametrize("saved, doubts", [(8, None), (9, measure.NOT_CHECKED)])
def test_what_the_model_says_of_cuda_is_checked_by_measuring(saved, doubts):
    case = toy_case("lora", dtype="bfloat16")
    known = not_covered(case.shape, 2, PLAIN, "cuda")
    assert known == measure.NOT_CHECKED
    assert measure.checked({"saved": 8, "fits": known}, saved)["fits"] == doubts
    other = {"saved": 8, "fits": f"{known}; another"}
    assert measure.checked(other, 8)["fits"] == "another"
    assert measure.checked(other, None) == other and measure.checked(None, 8) is None


# What must be caught


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
def test_a_method_that_does_not_train_is_caught(tmp_path, monkeypatch, capsys, method, words):
    monkeypatch.setitem(METHODS, "lora", method)
    assert run_main(tmp_path, "--only", "tokens/toy/1x8/float32/lora") == 1
    (entry,) = written(tmp_path).values()
    assert words in entry["extra_info"]["status"] and entry["stats"] is None
    assert words in capsys.readouterr().err


SLICES = "share/toy/2x8/float32/s2ft_inplace/1.00%"  # a few of the channels


def test_a_leaked_full_activation_is_caught(tmp_path, monkeypatch, capsys):
    """The trap of the method: the slice of x saved as a view, which pins all of x."""
    slices = SLICES.replace("inplace", "unfused")  # fused, the FFN keeps no slice
    assert run_main(tmp_path / "before", "--only", slices) == 0
    assert "expected" not in capsys.readouterr().out
    monkeypatch.setattr("s2kernels.autograd.linear.take", lambda x, where: x[:, where])
    run_main(tmp_path / "after", "--only", slices)
    # 16 tokens; the channels of the FFN in both layers, and of attention where a head is trained
    sizes = [
        written(tmp_path / when)[slices]["extra_info"]["bytes"]["saved"]
        for when in ("before", "after")
    ]
    assert sizes[1] - sizes[0] > 16 * 2 * 100 * 4
    assert f"keeps {sizes[1]:,} bytes, {sizes[0]:,} expected" in capsys.readouterr().out
    assert compare.main(files(tmp_path)) == 1
    assert f"LOSS  {slices}: saved" in capsys.readouterr().out


def test_a_slowed_kernel_is_caught(tmp_path, monkeypatch, capsys):
    # Rounds enough for quartiles that a busy machine does not move.
    precision = timing.Precision(error=1.0, min_rounds=9, max_rounds=9)
    monkeypatch.setitem(laboratory.PRECISION, "toy", precision)
    assert run_main(tmp_path / "before", "--only", SLICES) == 0
    quick = reference.slice_grad

    def slow(*arguments, **named):
        time.sleep(0.02)
        return quick(*arguments, **named)

    monkeypatch.setattr(reference, "slice_grad", slow)
    assert run_main(tmp_path / "after", "--only", SLICES) == 0
    assert compare.main(files(tmp_path)) == 1
    assert f"LOSS  {SLICES}: step / floor" in capsys.readouterr().out


def files(folder) -> list[str]:
    names = (str(folder / when / "cpu" / "steps.json") for when in ("before", "after"))
    return [
        word for pair in zip(("--reference", "--candidate"), names, strict=True) for word in pair
    ]


# Running out of memory


def test_out_of_memory_is_a_result(monkeypatch):
    def count(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(measure, "count", count)
    entry = measure.measure(toy_case("full"), setup())
    assert entry["stats"] is None and entry["extra_info"]["status"] == "out of memory"
    assert entry["extra_info"]["model"]["peak"] > 0


def test_two_models_that_do_not_fit_are_timed_apart(monkeypatch):
    alone, real = [], rounds.time_rounds

    def time_rounds(chosen, *others):
        if len(chosen) > 1:
            raise torch.OutOfMemoryError("no room for two")
        (run,) = real(chosen, *others)
        alone.append((chosen[0].method, run))
        return [run]

    monkeypatch.setattr(rounds, "time_rounds", time_rounds)
    shared = setup()
    entries = [measure.measure(toy_case(name), shared) for name in ("lora", "full")]
    assert [name for name, _ in alone] == ["frozen", "lora", "frozen", "full"]
    for entry, (_, floor) in zip(entries, alone[::2], strict=True):  # the floor right before it
        extra = entry["extra_info"]
        assert extra["status"] == "measured" and extra["paired"] is False
        expected = entry["stats"]["median"] / timing.quartiles(map(sum, floor.laps))["median"]
        assert extra["ratio_to_floor"]["median"] == pytest.approx(expected)


def test_an_allocation_beyond_free_memory_is_out_of_memory(monkeypatch):
    used = host._kilobytes

    def free(path, name):
        return 64 * 1024 if name == "MemAvailable" else used(path, name)

    monkeypatch.setattr(host, "_kilobytes", free)
    with host.within_free_memory(CPU), pytest.raises(RuntimeError) as error:
        torch.ones(2**30)
    assert fresh.out_of_memory(error.value)
    for words in ("CUDA error", "Triton Error [CUDA]"):
        assert fresh.out_of_memory(RuntimeError(f"{words}: out of memory"))
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert fresh.out_of_memory(RuntimeError(words))
    assert not fresh.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert torch.ones(2**26).sum() == 2**26  # the limit is gone


# Stopping and going on


@pytest.fixture
def quick(monkeypatch):
    return measure_at_once(monkeypatch)


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch, quick):
    listed = [case.id for case in cases.toy() if "tokens" in case.id]
    listed += [
        f"share/toy/2x8/float32/{name}/1.00%" for name in ("s2ft_inplace", "lora", "s2ft_unfused")
    ]
    measured = measure.measure

    def stopped(case, setup):
        if len(quick) == 2:
            raise KeyboardInterrupt
        return measured(case, setup)

    monkeypatch.setattr(measure, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path)
    *first, killed = [case.id for case in cases.toy()][:3]
    assert list(written(tmp_path)) == [*first, killed] and quick == first
    extra = written(tmp_path)[killed]["extra_info"]
    assert extra["status"] == "failed: not finished" and extra["total_parameters"] > 0

    monkeypatch.setattr(measure, "measure", measured)
    assert run_main(tmp_path, "--only", "tokens") == run_main(tmp_path, "--only", "share") == 0
    assert quick == first + listed
    unlike = {replace(case, suite="") for case in cases.toy()}
    assert run_main(tmp_path) == 0 and quick[-1] == killed  # last, what did not return
    assert written(tmp_path).keys() == {case.id for case in cases.toy()}
    assert len(quick) == len(set(quick)) == len(unlike) < len(cases.toy())
    assert run_main(tmp_path, "--again", "--only", "share/toy/2x8/float32/frozen") == 0
    assert quick[-1] == "share/toy/2x8/float32/frozen" and len(quick) == len(unlike) + 1


def test_a_case_of_two_suites_is_measured_once(tmp_path, quick):
    names = [
        f"{suite}/toy/2x8/float32/s2ft_inplace" for suite in ("figure5", "depth", "checkpointing")
    ]
    for name in names:
        assert run_main(tmp_path, "--only", name) == 0
    entries = written(tmp_path)
    assert quick == [names[0], f"{names[1]}+full_depth", f"{names[2]}+checkpointing"]
    for name in names[1:]:
        copy, first = entries[name], entries[names[0]]
        assert (copy["group"], copy["name"]) == (name.partition("/")[0], name)
        assert copy["fullname"].endswith(name) and copy["stats"] == first["stats"]
        told = first["extra_info"] | {"copy_of": names[0]}
        del told["visits"]
        assert copy["extra_info"] == told


def test_estimates_learn_from_what_was_measured_alone(tmp_path, monkeypatch, quick):
    learned = []
    monkeypatch.setattr(estimate.Estimate, "took", lambda self, case, s: learned.append(case.id))
    monkeypatch.setattr(estimate.Estimate, "seconds", lambda self, case: 100.0)

    def check(device, options):
        raise Unavailable("nowhere-torch is not installed")

    def measured(case, setup):
        if case.method == "lora":
            return measure.entry(case, None, {"status": "unavailable: nowhere-torch"})
        return fake_entry(case)

    monkeypatch.setattr(METHODS["lora"], "check", check)
    monkeypatch.setattr(measure, "measure", measured)
    # What is unavailable takes no time, whatever the estimate says of its steps.
    assert run_main(tmp_path, "--only", "tokens", "--budget-s", "60") == 0
    assert list(written(tmp_path)) == ["tokens/toy/1x8/float32/lora"]
    assert run_main(tmp_path, "--only", "tokens") == 0
    assert learned == ["tokens/toy/1x8/float32/s2ft_inplace"]


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys, quick):
    measured, bad = measure.measure, "tokens/toy/1x8/float32/s2ft_inplace"

    def fails(case, setup):
        if case.id == bad:
            raise ZeroDivisionError("of this case")
        return measured(case, setup)

    monkeypatch.setattr(measure, "measure", fails)
    assert run_main(tmp_path, "--only", "tokens") == 1
    status = written(tmp_path)[bad]["extra_info"]["status"]
    assert status == "failed: ZeroDivisionError: of this case" and len(quick) == 1
    assert "of this case" in capsys.readouterr().err

    monkeypatch.setattr(measure, "measure", measured)
    assert run_main(tmp_path) == 0 and quick[-1] == bad  # once more, after all the new ones
    assert written(tmp_path)[bad]["extra_info"]["status"] == "measured"


def test_unavailable_says_why(tmp_path, monkeypatch, capsys):
    def check(device, options):
        raise Unavailable("nowhere-torch is not installed")

    monkeypatch.setattr(METHODS["lora"], "check", check)
    assert run_main(tmp_path, "--only", "tokens/toy/1x8/float32/lora") == 0
    (entry,) = written(tmp_path).values()
    assert entry["extra_info"]["status"] == "unavailable: nowhere-torch is not installed"
    assert "unavailable" in capsys.readouterr().out


def test_a_budget_leaves_out_what_does_not_fit(tmp_path, monkeypatch, capsys, quick):
    seconds = {"lora": 100.0, "s2ft_inplace": 1.0}
    monkeypatch.setattr(estimate.Estimate, "seconds", lambda self, case: seconds[case.method])
    assert run_main(tmp_path, "--only", "tokens", "--budget-s", "60") == 0
    assert quick == ["tokens/toy/1x8/float32/s2ft_inplace"]
    assert "1 cases did not fit" in capsys.readouterr().out


def test_estimates_follow_what_cases_took():
    clock = estimate.Estimate(setup())
    small, large = (
        toy_case("lora"),
        replace(toy_case("full"), shape=TABLE["llama-2-7b"], length=512),
    )
    assert clock.seconds(large) > 10 * clock.seconds(small)
    before = clock.seconds(large)
    clock.took(small, 3 * clock.seconds(small))
    assert clock.seconds(large) == pytest.approx(3 * before)
    compiled = replace(large, options=replace(PLAIN, compile=True))
    assert clock.seconds(compiled) - clock.seconds(large) == pytest.approx(3 * clock.compilation)
    assert clock.seconds(replace(small, method="galore")) > clock.seconds(small)


RESIDENT = """
from pathlib import Path
import torch
from bench import host

print(host.keep_freed_memory() is not None)
for release in (False, True):
    torch.ones(2**24)  # 64 MiB, freed at once
    if release:
        host.give_back()
    print(host._kilobytes(Path("/proc/self/status"), "VmRSS"))
"""


def test_freed_memory_is_kept_and_given_back_between_cases():
    """The pages of a temporary are found once, and no longer held by the next case."""
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=True)
    is_glibc, *resident = done.stdout.split()
    if is_glibc == "False":
        pytest.skip("another libc than glibc")
    kept, given_back = map(int, resident)
    assert kept - given_back > 60 * 1024


def test_the_record_names_the_allocator(tmp_path, quick):
    assert run_main(tmp_path, "--only", "tokens") == 0
    machine = json.loads((tmp_path / "cpu" / "steps.json").read_text())["machine_info"]
    assert machine.get("allocator") == host.keep_freed_memory()
    assert report.same_machine(machine, machine)
    other = machine | {"allocator": "another"}
    assert not report.same_machine(machine, other)


def test_results_of_another_machine_are_not_mixed_in(tmp_path, capsys):
    record = Record(tmp_path / "steps.json", CPU, {})
    record.add(fake_entry(toy_case("lora")))
    again = Record(record.path, CPU, {"ceilings": 1})
    assert len(again.entries) == again.machine["ceilings"] == 1
    again.add(fake_entry(toy_case("full")))
    assert Record(record.path, CPU, {"ceilings": 2}).machine["ceilings"] == 1  # of the entries
    document = json.loads(record.path.read_text())
    document["machine_info"]["torch"] = "1.0"
    record.path.write_text(json.dumps(document))
    begun = Record(record.path, CPU, {"ceilings": 2})
    assert begun.entries == {} and begun.machine["ceilings"] == 2
    assert "another machine or of other versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "toy"], "--results is wanted"),
        (["--suite", "cpu", "--budget-s", "0"], "--budget-s must be above 0"),
        (["--suite", "abacus"], "invalid choice"),
    ],
)
def test_main_rejects_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        laboratory.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
