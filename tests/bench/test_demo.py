"""The demo at toy size, and its measuring tools: they must see what they are there to see."""

import json

import pytest
import torch

from bench.demo import __main__ as demo
from bench.demo import corpus, job, training
from bench.demo.job import ENTRANTS, FLOOR, S2FT
from bench.measure import machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(exit code, results file, folder of figures, folder of adapters) of one toy run."""
    folder = tmp_path_factory.mktemp("demo")
    code = demo.main(toy_arguments(folder))
    device = machine.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return code, folder / "results" / device / "demo.json", folder / "figures" / device, folder


def toy_arguments(folder):
    places = {"--results": "results", "--figures": "figures", "--adapters": "adapters"}
    options = [word for option, name in places.items() for word in (option, str(folder / name))]
    return ["--toy", "--budget-s", "1.5", *options]


def test_main_writes_results_figures_and_adapters(toy):
    code, results, figures, folder = toy
    assert code == 0
    assert sorted(p.name for p in results.parent.iterdir()) == ["demo.json"]
    assert sorted(p.name for p in figures.iterdir()) == [
        "demo-losses.svg",
        "demo-memory.svg",
        "demo-step-time.svg",
    ]
    for name in S2FT:
        name = name.replace(" ", "-")
        assert (folder / "adapters" / name / "adapter_model.safetensors").is_file()


def test_results_have_the_shape_of_pytest_benchmark(toy):
    document = json.loads(toy[1].read_text())
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= document.keys()
    assert {"torch", "triton", "transformers", "peft", "gpu", "cpu"} <= (
        document["machine_info"].keys()
    )
    entries = {entry["name"]: entry for entry in document["benchmarks"]}
    assert set(entries) == {"pre-training", *ENTRANTS}
    for entry in entries.values():
        assert {"median", "iqr", "data"} <= entry["stats"].keys()
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"])
    for name in set(entries) - {"pre-training"}:
        extra = entries[name]["extra_info"]
        assert len(extra["losses"]) == entries[name]["params"]["steps"] == 8
        assert extra["held_out"]["steps"] == [0, 2, 4, 6, 8]
        assert extra["bytes"]["unseen"] == 0


def test_results_tell_the_methods_apart(toy):
    entries = json.loads(toy[1].read_text())["benchmarks"]
    extras = {entry["name"]: entry["extra_info"] for entry in entries}
    floor = extras[FLOOR]
    assert floor["trained_parameters"] == 0 and floor["bytes"]["gradients"] == 0
    assert len(set(floor["held_out"]["losses"])) == 1
    for name in ("full", "lora", "spiel", *S2FT):
        extra = extras[name]
        itemsize = extra["bytes"]["gradients"] / extra["trained_parameters"]
        assert itemsize in (2, 4)
        assert extra["held_out"]["losses"][0] == floor["held_out"]["losses"][0]
        assert extra["held_out"]["losses"][-1] != floor["held_out"]["losses"][-1]
    *equal, small = (extras[name] for name in S2FT)
    for extra in equal[1:]:
        assert extra["losses"] == pytest.approx(equal[0]["losses"], rel=1e-3)
    for extra in equal:
        assert extra["trained_parameters"] == extras["lora"]["trained_parameters"]
    # batch 4 of length 16, two layers of one head of 8 channels, and of 64 channels in the FFN
    beyond_floor = small["bytes"]["saved"] - floor["bytes"]["saved"]
    assert beyond_floor == 4 * 16 * 2 * (8 - 64) * 4
    assert small["trained_parameters"] == 2 * 32 * (8 + 4)
    assert all(extra["ratio_as_run"] > 0 for extra in (*equal, small))


def test_main_fails_on_one_leaked_activation(tmp_path, monkeypatch):
    """The trap of the method: the slice of x saved as a view, which pins all of x."""
    monkeypatch.setattr("s2kernels.autograd.linear.take", lambda x, where: x[:, where])
    assert demo.main(toy_arguments(tmp_path)) == 1


@pytest.mark.parametrize("arguments", [["--budget-s", "0"], ["--steps", "9"]])
def test_main_rejects_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_slow_machine_takes_fewer_steps():
    chosen = job.CPU
    assert demo.affordable_steps(chosen, 0.001) == chosen.steps == 60
    assert demo.affordable_steps(chosen, 100.0) == chosen.least_steps == 12
    # 165 s for rounds of nine steps, each of which takes four times a pre-training step
    assert demo.affordable_steps(chosen, 0.125) == 36


def test_the_demo_writes_to_an_untracked_folder():
    args = demo.parse([])
    out = machine.ROOT / "out"
    assert (args.results, args.figures) == (out / "results", out / "figures")
    assert "/out/" in (machine.ROOT / ".gitignore").read_text().splitlines()


def test_s2ft_has_as_many_parameters_as_lora():
    config = job.CPU.shape.config(job.CPU.length)
    equal, small = map(job.CPU.budget, ("s2ft inplace", "s2ft small"))
    per_head = config.hidden_size * config.hidden_size // config.num_attention_heads
    numbers = [
        config.num_hidden_layers * (b.heads * per_head + b.channels * config.hidden_size)
        for b in (equal, small)
    ]
    assert numbers == [294_912, 40_960]
    assert numbers[0] == pytest.approx(290_816, rel=0.02)  # of LoRA of rank 16


def test_schedule_warms_up_and_ends_at_zero():
    values = [training.schedule(step / 100) for step in range(101)]
    assert values[0] == 0.0 and max(values) == values[5] == 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert values[5:] == sorted(values[5:], reverse=True)


def test_corpus_is_there_and_held_out_text_is_not_trained_on():
    assert b"import" in corpus.source_code()
    text = corpus.reference_text()
    train, held_out = corpus.split(corpus.as_tokens(text), held_out=0.1)
    assert bytes(train) + bytes(held_out) == text
    assert len(held_out) == pytest.approx(0.1 * len(text), abs=1)


def test_windows_are_runs_of_the_text():
    tokens = torch.arange(100, dtype=torch.uint8)
    for windows in (
        corpus.random_batch(tokens, 50, 8, torch.Generator().manual_seed(0)),
        corpus.random_batch(tokens, 2, 100, torch.Generator().manual_seed(0)),
    ):
        assert windows.dtype == torch.int64
        assert (windows.diff(dim=1) == 1).all()
