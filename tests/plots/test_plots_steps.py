"""Bars, lines and marks are where the numbers of the results are."""

import copy
import dataclasses

import pytest
import synthetic_results as synthetic
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import bars, density, kernels, lines, paper, steps, style

LABELS = {look.label: name for name, look in style.METHODS.items()}


def panels(fig: Figure) -> list[Axes]:
    return [axes for axes in fig.axes if axes.axison]


def rows(axes: Axes) -> list[str]:
    return [LABELS[label.get_text()] for label in axes.get_yticklabels()]


def ends(axes: Axes) -> dict[float, float]:
    """Where the last bar at each place ends, by the place of its middle."""
    return {
        round(bar.get_y() + bar.get_height() / 2, 6): bar.get_x() + bar.get_width()
        for bar in axes.patches
    }


def written(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def line(axes: Axes, label: str) -> list[tuple[float, float]]:
    found = next(line for line in axes.lines if line.get_label() == label)
    return list(zip(found.get_xdata(), found.get_ydata(), strict=True))


def by_method(fig: Figure) -> dict[str, Axes]:
    return {LABELS[axes.get_title()]: axes for axes in panels(fig)}


@pytest.fixture(scope="module")
def cpu() -> dict:
    return synthetic.cpu_steps()


@pytest.fixture(scope="module")
def gpu() -> dict:
    return synthetic.gpu_steps()


def of(document: dict, suite: str, shape: str) -> list[steps.Step]:
    return [step for step in steps.read(document, suite) if step.shape == shape]


def test_the_bars_of_figure5_are_times_and_peaks(gpu):
    fig = bars.time_and_memory(of(gpu, "figure5", "llama-2-13b"))
    sizes = [(512, 1), (1024, 1), (1024, 2)]
    assert len(panels(fig)) == 2 * len(sizes)
    for (length, batch), time, memory in zip(sizes, fig.axes[::2], fig.axes[1::2], strict=True):
        assert time.get_title(loc="left") == f"llama-2-13b, length {length:,}, batch {batch}"
        assert rows(time) == list(synthetic.METHODS) == list(style.METHODS)
        size = {"shape": "llama-2-13b", "length": length, "batch": batch, "dtype": "bfloat16"}
        for place, name in enumerate(rows(time)):
            extra = synthetic.step("figure5", name, **size)["extra_info"]
            median = synthetic.step("figure5", name, **size)["stats"]["median"]
            if name == "full" or (name == "dora" and length * batch == 2048):
                assert place not in ends(time) and place not in ends(memory)
                continue
            assert ends(time)[place] == pytest.approx(median * 1e3)
            assert ends(memory)[place] == pytest.approx(extra["bytes"]["peak"] / 2**30)
        missing = 2 if length * batch == 2048 else 1
        for axes in (time, memory):
            assert written(axes).count("OOM") == missing
            assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= max(ends(axes).values())


def test_quartiles_and_ratio_are_those_of_the_results(cpu):
    axes = bars.time_and_memory(of(cpu, "figure5", "small")).axes[0]
    floor = synthetic.step("figure5", "lora")["extra_info"]["floor_seconds"]["median"] * 1e3
    [whisker] = axes.containers[2 * rows(axes).index("lora") + 1].lines[2]
    (low, _), (high, _) = whisker.get_segments()[0]
    assert (low, high) == pytest.approx((1.14 * floor, 1.17 * floor))
    assert any(text.endswith("(1.15)") for text in written(axes))
    assert any(text.startswith("n/a") for text in written(axes))


def test_parts_add_up_to_the_peak(cpu):
    fig = bars.peaks(of(cpu, "figure5", "small"))
    axes = fig.axes[0]
    for place, name in enumerate(rows(axes)):
        if name == "galore":
            continue
        extra = synthetic.step("figure5", name)["extra_info"]
        assert ends(axes)[place] == pytest.approx(extra["bytes"]["peak"] / 2**20)
        first = extra["bytes"]["first_step_peak"] / 2**20
        ticks = [(float(t.get_xdata()[0]), t.get_ydata()[0]) for t in axes.lines]
        assert any(tick == pytest.approx((first, place)) for tick in ticks)
    sizes = synthetic.step("figure5", "full")["extra_info"]["bytes"]
    assert list(bars.parts(sizes)) == ["weights", "optimizer", "gradients", "temporaries"]
    assert list(bars.parts({**sizes, "gradients": 1})) == [
        *("weights", "optimizer", "saved", "temporaries")
    ]
    assert bars.parts({**sizes, "saved": None})["gradients"] == sizes["gradients"]


def test_lines_over_tokens_and_what_the_paper_printed(gpu):
    found = of(gpu, "tokens", "llama-2-7b")
    time, memory = (by_method(fig) for fig, _ in lines.over_tokens(found).values())
    assert list(time) == [name for name in synthetic.METHODS if name != "frozen"]
    step = synthetic.step("tokens", "lora", shape="llama-2-7b", length=512, dtype="bfloat16")
    seconds = step["stats"]["median"]
    assert line(time["lora"], "measured")[1] == pytest.approx((512, seconds / 512 * 1e6))
    floor = line(time["lora"], "frozen floor")[1][1]
    assert floor == pytest.approx(seconds / 1.15 / 512 * 1e6)
    size = step["extra_info"]["bytes"]["peak"] / 2**30
    assert line(memory["lora"], "measured")[1] == pytest.approx((512, size))
    printed = line(time["s2ft_permuted_inplace"], paper.MACHINE)
    assert printed[0] == pytest.approx((512, 118e-3 / 512 * 1e6)) and len(printed) == 4
    assert line(memory["full"], paper.MACHINE)[-1] == pytest.approx((2048, 54e9 / 2**30))
    assert paper.MACHINE not in [drawn.get_label() for drawn in time["spiel"].lines]
    for axes in (time["lora"], memory["full"]):
        values = [y for drawn in axes.lines for y in drawn.get_ydata()]
        assert axes.get_ylim()[0] <= min(values) and max(values) <= axes.get_ylim()[1]


def test_tokens_mark_what_did_not_fit(gpu):
    axes = by_method(lines.over_tokens(of(gpu, "tokens", "llama-2-13b"))["memory"][0])
    assert written(axes["full"]) == ["OOM"] * 5 and line(axes["full"], "measured") == []
    assert written(axes["dora"]) == ["OOM"] * 2 and len(line(axes["dora"], "measured")) == 3
    assert [text.xy[0] for text in axes["dora"].texts] == [2048, 8192]


def test_the_paper_has_what_it_printed():
    assert paper.series("llama-2-7b", "lora")[0] == (512, 0.138, 20e9)
    assert paper.series("llama-2-13b", "galore")[-1] == (2048, 1.763, 70e9)
    assert paper.series("llama-2-13b", "full") == paper.series("small", "lora") == []
    assert [tokens for tokens, *_ in paper.series("llama-2-13b", "dora")] == [512, 1024, 1024]


def test_lines_over_the_share_trained(cpu):
    found = of(cpu, "share", "small")
    time, memory = (by_method(fig) for fig, _ in lines.over_share(found).values())
    assert list(time) == ["lora", "s2ft_inplace"]
    ratios = [1.15 * 1.003, 1.15 * 1.03, 1.15 * 1.3]
    assert line(time["lora"], "measured") == [
        pytest.approx(point) for point in zip((0.1, 1, 10), ratios, strict=True)
    ]
    floors = [drawn for drawn in time["lora"].lines if drawn.get_label() == "frozen floor"]
    assert set(floors[-1].get_ydata()) == {1.0}
    size = synthetic.step("figure5", "frozen")["extra_info"]["bytes"]["peak"] / 2**20
    floors = [drawn for drawn in memory["lora"].lines if drawn.get_label() == "frozen floor"]
    assert floors[-1].get_ydata()[0] == pytest.approx(size)


def test_the_density_says_what_an_entry_takes(cpu):
    found = of(cpu, "density", "small")
    axes = density.figure(found).axes[0]
    tenth, half = (
        synthetic.step("density", "spiel", length=16, share=share)["extra_info"]
        for share in (0.1, 0.5)
    )
    more = half["bytes"]["peak"] - tenth["bytes"]["peak"]
    each = more / (half["trained_parameters"] - tenth["trained_parameters"])
    label = f"spiel: {each:.0f} bytes an entry, from the largest two"
    floor = synthetic.step("density", "frozen", length=16)["extra_info"]["bytes"]["peak"]
    assert line(axes, label)[-1] == pytest.approx((50, (half["bytes"]["peak"] - floor) / 2**20))


def test_without_a_measured_density_there_is_no_figure_of_it(tmp_path):
    """A run that its budget ended has the floor, and none of the densities."""
    floor = [synthetic.step("density", name, length=16) for name in ("frozen", "full")]
    missing = synthetic.step("density", "spiel", length=16, share=0.1, status="out of memory")
    assert density.draw(synthetic.document([*floor, missing]), tmp_path) == []
    assert density.draw(synthetic.document(floor), tmp_path) == []
    measured = synthetic.step("density", "spiel", length=16, share=0.01)
    (drawn,) = density.draw(synthetic.document([*floor, missing, measured]), tmp_path)
    assert drawn.name == "density-small.svg"


def test_options_stand_side_by_side(cpu):
    found = of(cpu, "checkpointing", "small")
    fig = bars.time_and_memory(found)
    height = 0.42
    for place, name in enumerate(rows(fig.axes[0])):
        for lane, on in enumerate((False, True)):
            step = synthetic.step("figure5", name, batch=2, checkpointing=on)
            middle = round(place + (lane - 0.5) * height, 6)
            assert ends(fig.axes[0])[middle] == pytest.approx(step["stats"]["median"] * 1e3)
            size = step["extra_info"]["bytes"]["peak"] / 2**20
            assert ends(fig.axes[1])[middle] == pytest.approx(size)
    many = [dataclasses.replace(step, options=str(i)) for i, step in enumerate(found)]
    with pytest.raises(ValueError, match="tell 6 options apart"):
        bars.time_and_memory(many)


def test_two_cuts_are_extrapolated_to_all_layers():
    # no straight line, so that the cuts taken are seen
    slowed = {1: 1, 2: 1, 4: 2, 8: 1}
    entries = [synthetic.step("extrapolation", "full", layers=n, slowed=slowed[n]) for n in slowed]
    one, two, four, whole = (entry["stats"]["median"] * 1e3 for entry in entries)
    found = steps.read(synthetic.document(entries), "extrapolation")
    axes = by_method(lines.over_layers(found)["time"][0])["full"]
    assert line(axes, "measured") == [(1, one), (2, two), (4, four), (8, whole)]
    [end] = line(axes, "extrapolated from two cuts")
    assert end == pytest.approx((8, one + 7 * (two - one)))


def test_the_share_of_the_ceiling():
    document = synthetic.ops(synthetic.GPU, ["a M=1", "b M=2"], ["torch", "triton"])
    fig = kernels.figure(document)
    assert [axes.get_title(loc="left") for axes in panels(fig)] == ["a M=1", "b M=2"]
    for axes in panels(fig):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["linear", "swiglu"]
        assert sorted(ends(axes).items()) == [
            (-0.19, pytest.approx(50)),
            (0.19, pytest.approx(80)),
            (0.81, pytest.approx(50)),
            (1.19, pytest.approx(80)),
        ]
        assert written(axes) == ["50% GEMM", "80% GEMM", "50% copy", "80% copy"]


def test_without_ceilings_there_is_no_figure_of_kernels(tmp_path):
    document = synthetic.ops(synthetic.CPU, ["small M=256"], ["torch"])
    del document["machine_info"]["ceilings"]
    assert kernels.draw(document, tmp_path) == [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"method": "magic"}}, "got \\['magic'\\]"),
        ({"extra_info": {"status": "tired"}}, "got 'tired'"),
    ],
)
def test_results_that_cannot_be_drawn_are_refused(change, message):
    entry = synthetic.step("figure5", "lora")
    wrong = copy.deepcopy(entry)
    for part, values in change.items():
        wrong[part].update(values)
    with pytest.raises(ValueError, match=message):
        steps.read(synthetic.document([entry, wrong]), "figure5")


def test_a_document_without_a_suite_draws_nothing(tmp_path):
    document = synthetic.document([])
    for figures in (bars, lines, density):
        assert figures.draw(document, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suite", ["figure5", "tokens", "share", "extrapolation", "checkpointing"])
def test_an_interrupted_run_can_be_drawn(suite, tmp_path):
    document = synthetic.document([synthetic.step(suite, "frozen")])
    for figures in (bars, lines, density):
        figures.draw(document, tmp_path)
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert drawn == {"figure5": {"figure5-small", "peak-small"}}.get(
        suite, {"checkpointing-small"} if suite == "checkpointing" else set()
    )


def test_one_depth_is_not_extrapolated(tmp_path):
    document = synthetic.document([synthetic.step("extrapolation", "lora", layers=1)])
    assert lines.draw(document, tmp_path) == []


def test_bars_are_ratios_on_one_floor_for_a_size():
    """LoRA and its floor were timed in a slow moment: its bar is as if it was measured with all."""
    usual = [synthetic.step("figure5", name) for name in ("frozen", "full", "lora")]
    busy = [*usual[:2], synthetic.step("figure5", "lora", slowed=1.4)]
    times = [
        [step.milliseconds() for step in steps.read(synthetic.document(entries), "figure5")]
        for entries in (usual, busy)
    ]
    assert times[0] == pytest.approx(times[1])
    alone = steps.read(synthetic.document(busy[2:]), "figure5")  # its own floor is all there is
    assert alone[0].milliseconds() == pytest.approx(1.4 * times[0][2])


@pytest.mark.parametrize("other", [{"batch": 2}, {"layers": 2}, {"checkpointing": True}])
def test_another_size_or_option_has_a_floor_of_its_own(other):
    floors = [synthetic.step("tokens", "frozen"), synthetic.step("tokens", "frozen", **other)]
    entries = [*floors, synthetic.step("tokens", "lora", **other, slowed=3.0)]
    found = steps.read(synthetic.document(entries), "tokens")
    (lora,) = (step for step in found if step.method == "lora")
    expected = floors[1]["stats"]["median"] * entries[2]["extra_info"]["ratio_to_floor"]["median"]
    assert lora.milliseconds() == pytest.approx(expected * 1e3)
