"""The demo at toy size, and its measuring tools: they must see what they are there to see."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from bench import corpus, demo, memory, methods, report, timing, training
from bench.jobs import FLOOR, S2FT

M, K, N, R = 6, 10, 4, 3
FP32 = 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Toy operations are too small to share: threads of a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(exit code, results file, folder of figures, folder of adapters) of one toy run."""
    folder = tmp_path_factory.mktemp("demo")
    code = demo.main(toy_arguments(folder))
    device = report.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return code, folder / "results" / device / "demo.json", folder / "figures" / device, folder


def toy_arguments(folder):
    places = {"--results": "results", "--figures": "figures", "--adapter": "adapters"}
    options = [word for option, name in places.items() for word in (option, str(folder / name))]
    return ["--toy", "--steps", "10", "--pretrain-seconds", "0.3", *options]


def test_main_writes_results_figures_and_adapters(toy):
    code, results, figures, folder = toy
    assert code == 0
    assert sorted(p.name for p in results.parent.iterdir()) == ["demo.json"]
    assert sorted(p.name for p in figures.iterdir()) == [
        "demo-losses.svg",
        "demo-memory.svg",
        "demo-step-time.svg",
    ]
    for name in ("s2ft-inplace", "s2ft-additive"):
        assert (folder / "adapters" / name / "adapter_model.safetensors").is_file()


def test_results_have_the_shape_of_pytest_benchmark(toy):
    document = json.loads(toy[1].read_text())
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= document.keys()
    assert {"torch", "triton", "transformers", "peft", "gpu", "cpu"} <= (
        document["machine_info"].keys()
    )
    entries = {entry["name"]: entry for entry in document["benchmarks"]}
    assert set(entries) == {"pre-training", "full", "lora", "spiel", *S2FT, FLOOR}
    for entry in entries.values():
        assert {"median", "iqr", "data"} <= entry["stats"].keys()
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"])
    for name in set(entries) - {"pre-training"}:
        extra = entries[name]["extra_info"]
        assert len(extra["losses"]) == entries[name]["params"]["steps"] == 10
        assert extra["held_out"]["steps"] == [0, 5, 10]
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
    inplace, additive = (extras[name] for name in S2FT)
    assert inplace["losses"] == pytest.approx(additive["losses"], rel=1e-3)
    # batch 4 of length 16, two layers of one head of 8 channels, and of 64 channels in the FFN
    assert inplace["in_slices"]["beyond_floor"] == 4 * 16 * 2 * (8 - 64) * 4
    assert sorted(inplace["in_slices"]["r"].values()) == [4, 4, 8, 8]
    assert inplace["as_run"]["saved"] < floor["bytes"]["saved"]


def test_main_fails_on_one_leaked_activation(tmp_path, monkeypatch):
    """The trap of the method: the slice of x saved as a view, which pins all of x."""
    monkeypatch.setattr("s2kernels.autograd.linear.take", lambda x, where: x[:, where])
    assert demo.main(["--device", "cpu", *toy_arguments(tmp_path)]) == 1


@pytest.mark.parametrize(
    "arguments", [["--steps", "3"], ["--pretrain-seconds", "0"], ["--device", "abacus"]]
)
def test_main_rejects_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


class Keeps(torch.autograd.Function):
    """The identity on x (M, K), which keeps something of x for its backward."""

    @staticmethod
    def forward(ctx, x, what):
        if what == "view":
            ctx.save_for_backward(x[:, :R])
        elif what == "copy":
            ctx.save_for_backward(x[:, :R].clone())
        elif what == "attribute":
            ctx.leak = x[:, :R].clone()
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@pytest.mark.parametrize(
    "what, saved, unseen",
    [
        ("nothing", 0, 0),
        ("view", M * K * FP32, 0),
        ("copy", M * R * FP32, 0),
        ("attribute", 0, M * R * FP32),
    ],
)
def test_kept_by_sees_what_a_function_keeps(what, saved, unseen):
    start = torch.randn(M, K, requires_grad=True)
    kept = memory.kept_by(lambda: Keeps.apply(start + 1, what).sum(), nn.Module())
    assert kept == memory.Kept(saved, unseen)


def test_kept_by_sees_what_a_module_keeps():
    class Leaky(nn.Linear):
        def forward(self, x):
            self.last = x + 1
            return super().forward(x)

    model = Leaky(K, N).requires_grad_(False)
    x = torch.randn(M, K, requires_grad=True)
    assert memory.kept_by(lambda: model(x).sum(), model) == memory.Kept(0, M * K * FP32)


def test_kept_by_counts_storages_once_and_no_parameters():
    model = nn.Linear(K, N)
    x = torch.randn(M, K, requires_grad=True)

    def forward():
        h = x * 2  # saved by both layers and, as a view, by the product
        return (model(h) + model(h)).sum() + (h[:, :R] * h[:, -R:]).sum()

    assert memory.kept_by(forward, model) == memory.Kept(M * K * FP32, 0)
    model.requires_grad_(False)
    assert memory.kept_by(lambda: model(x * 2).sum(), model) == memory.Kept(0, 0)


def test_kept_by_leaves_out_what_the_graph_dropped():
    x = torch.randn(M, K, requires_grad=True)

    def forward():
        (x.exp() * x).sum()  # a branch that the loss does not hold
        return x.sum()

    assert memory.kept_by(forward, nn.Module()) == memory.Kept(0, 0)


def test_total_bytes_of_model_gradients_and_states():
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("buffer", torch.zeros(5))
    model[0].cache = {"slice": [torch.zeros(7)]}
    assert memory.total_bytes(memory.model_tensors(model)) == (K * N + 5 + 7) * FP32
    assert memory.total_bytes(memory.gradients(model)) == 0
    model[0](torch.randn(M, K)).sum().backward()
    assert memory.total_bytes(memory.gradients(model)) == K * N * FP32
    optimizer = methods.adamw(list(model.parameters()), 1e-3)
    optimizer.step()
    assert memory.total_bytes(memory.states(optimizer)) == (2 * K * N + 1) * FP32


def test_order_gives_every_method_every_place():
    names = ["a", "b", "c", "d", "e"]
    orders = [timing.order(names, round_) for round_ in range(2 * len(names))]
    assert all(sorted(order) == names for order in orders)
    for place in range(len(names)):
        assert set(Counter(order[place] for order in orders).values()) == {2}


def test_interleave_runs_each_step_once_a_round():
    calls = []
    steps = {name: (lambda i, name=name: calls.append((i, name))) for name in "ab"}
    rounds = list(timing.interleave(steps, 3, torch.device("cpu")))
    assert sorted(calls) == [(i, name) for i in range(3) for name in "ab"]
    assert all(list(times) == ["a", "b"] and min(times.values()) >= 0 for times in rounds)


def test_paired_ratios_do_not_see_a_machine_that_slows_down():
    floor = [1.0, 1.0, 9.0, 1.0]
    ratios = timing.quartiles(timing.paired_ratios([1.5 * t for t in floor], floor))
    assert ratios["median"] == 1.5 and ratios["iqr"] == 0.0


def test_stats():
    stats = timing.stats([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (stats["min"], stats["max"], stats["mean"], stats["median"]) == (1.0, 10.0, 4.0, 3.0)
    assert (stats["q1"], stats["q3"], stats["iqr"], stats["rounds"]) == (2.0, 4.0, 2.0, 5)
    assert stats["outliers"] == "1;1"  # 10 lies beyond the deviation of 3.5 and beyond 4 + 1.5 * 2


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
        corpus.even_windows(tokens, 5, 8),
        corpus.random_batch(tokens, 50, 8, torch.Generator().manual_seed(0)),
        corpus.random_batch(tokens, 2, 100, torch.Generator().manual_seed(0)),
    ):
        assert windows.dtype == torch.int64
        assert (windows.diff(dim=1) == 1).all()
    assert corpus.even_windows(tokens, 5, 8)[[0, -1], [0, -1]].tolist() == [0, 99]


def test_write_json_writes_all_or_nothing(tmp_path):
    path = tmp_path / "cpu" / "demo.json"
    report.write_json(path, [{"name": "first"}], torch.device("cpu"))
    before = path.read_text()
    with pytest.raises(TypeError):
        report.write_json(path, [{"name": object()}], torch.device("cpu"))
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]
