"""Tables and figures of docs/learning.md: what they compare, and what they say of no results."""

import json

import pytest

from plots import learning, learning_tables, studies, tables
from plots.studies import DOWN

MACHINE = {
    "cpu": {"brand_raw": "Chip", "count": 2},
    "gpu": None,
    **{name: "1.0" for name in ("torch", "transformers", "peft")},
}
COMMON = {"protocol": {"version": 1}, "model": "a", "data": "b"}


def entry(easy, *, validation=1.0, text=3.0, common=COMMON, **run):
    measures = {"easy loss": easy, "easy exact": 0.5, "hard loss": 0.8, "knowledge": 0.4}
    result = {
        "trained parameters": 1000,
        "losses": [2.0] * 30 + [0.25] * 10,
        "validation loss": validation,
        "measures": measures | {"text loss": text},
    }
    return {"run": run, "common": common, "result": result}


def write(folder, study, entries):
    place = folder / "cpu" / "learning"
    place.mkdir(parents=True, exist_ok=True)
    document = {"machine_info": MACHINE, "left out": {}, "runs": entries}
    (place / f"{study}.json").write_text(json.dumps(document))


@pytest.fixture
def results(tmp_path):
    """LoRA and S2FT at two rates, three seeds at the better one; two kinds of channels."""
    runs = [entry(1.5, method="frozen")]
    runs.append(entry(0.2, validation=0.9, method="lora", lr=1e-3))  # best on the test alone
    runs.append(entry(0.6, validation=0.5, method="lora", lr=3e-3))
    runs.append(entry(0.7, validation=0.6, method="lora", lr=9e-3))
    runs += [entry(0.6 + 0.1 * s, method="lora", lr=3e-3, seed=s) for s in (1, 2)]
    down = {"method": "s2ft", "projections": DOWN}
    runs.append(entry(0.9, validation=0.8, **down, lr=1e-3))
    runs.append(entry(0.5, validation=0.4, **down, lr=3e-3))
    runs.append(entry(0.5, validation=0.6, **down, lr=9e-3))
    runs += [entry(0.5 + 0.1 * s, **down, lr=3e-3, seed=s) for s in (1, 2)]
    runs.append(entry(0.4, **down, lr=3e-3, rank=13))
    write(tmp_path, "learn", runs)
    scored = {"activation smallest": (0.5, 0.61, 0.69), "weight largest": (0.7, 0.81, 0.92)}
    write(
        tmp_path,
        "channels",
        [
            entry(loss, **down, lr=3e-3, channels=name, **({"seed": seed} if seed else {}))
            for name, losses in scored.items()
            for seed, loss in enumerate(losses)
        ],
    )
    return tmp_path


def cells(text, label, table=0):
    block = text.split("\n\n")[table]
    columns = [c.strip() for c in block.splitlines()[0].strip("|").split("|")]
    row = next(line for line in block.splitlines() if line.startswith(f"| {label} |"))
    return dict(zip(columns, [c.strip() for c in row.strip("|").split("|")], strict=True))


def test_a_difference_is_paired_by_seed():
    ours, others = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.9, 1: 1.9, 2: 2.9, 5: 0.0}
    assert studies.compared(ours, others) == "+0.100 (+0.100 to +0.100)"


def test_an_interval_that_holds_zero_shows_no_difference():
    text = studies.compared({0: 0.1, 1: -0.1, 2: 0.03}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert text == "+0.010 (-0.242 to +0.262), no difference shown"
    assert studies.compared({0: 0.5}, {0: 0.1}) == "+0.400 (one seed)"
    assert studies.compared({0: 0.5}, {1: 0.1}) == ""


def test_the_interval_is_students():
    assert studies.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert studies.interval([1.0]) is None


def test_the_rate_is_that_of_the_lowest_validation_loss(results):
    text = tables.TABLES["learning learn"](results)
    row = cells(text, "lora")
    assert (row["rate"], row["seeds"], row["easy loss"]) == ("0.003", "3", "0.700 ± 0.248")
    assert row["train loss"] == "0.250 ± 0.000"
    assert cells(text, "frozen")["easy loss"] == "1.500"
    less = cells(text, "s2ft down", table=1)
    assert less["easy loss"] == "-0.100 (-0.100 to -0.100)"
    assert less["text loss"].endswith("no difference shown")


def test_no_rate_is_chosen_before_the_grid_is_complete():
    def found(*losses):
        rates = (1e-3, 3e-3, 9e-3, 27e-3)
        pairs = zip(rates, losses, strict=False)
        return [({"method": "lora", "lr": lr}, {"validation loss": loss}) for lr, loss in pairs]

    assert studies.chosen(found(0.5, 0.4), method="lora") is None
    assert studies.chosen(found(0.5, 0.4, 0.3), method="lora") is None  # a higher one is due
    assert studies.chosen(found(0.5, 0.4, 0.3, 0.35), method="lora")[0] == 9e-3
    assert studies.chosen(found(0.5, 0.4, 0.45), method="lora")[0] == 3e-3


def test_every_rate_is_shown(results):
    text = tables.TABLES["learning grid"](results)
    assert text.count("| lora |") == 3 and "| 0.001 | 0.900 | 0.200 |" in text


def test_channels_are_compared_with_random_ones(results):
    text = tables.TABLES["learning channels"](results)
    assert cells(text, "random")["seeds"] == "3"
    assert cells(text, "activation smallest", 1)["easy loss"].endswith("no difference shown")
    assert cells(text, "weight largest", 1)["easy loss"] == "+0.210 (+0.185 to +0.235)"


def test_results_of_another_protocol_are_left_out(results):
    path = results / "cpu" / "learning" / "learn.json"
    document = json.loads(path.read_text())
    document["runs"].insert(0, entry(9.9, method="frozen", common={"protocol": {"version": 0}}))
    path.write_text(json.dumps(document))
    assert cells(tables.TABLES["learning learn"](results), "frozen")["easy loss"] == "1.500"


@pytest.mark.parametrize("name", learning_tables.TABLES)
def test_a_study_that_was_not_run_says_which_command_runs_it(name, tmp_path):
    text = tables.TABLES[name](tmp_path)
    if name == "learning state":
        assert cells(text, "learn") == {
            **{"study": "learn", "runs done": "0", "needed": "42", "seconds a run": ""}
        }
    else:
        assert text.startswith("Not run yet") and "`python -m bench.learning " in text


def test_figures_are_drawn_of_what_there_is(results, tmp_path):
    drawn = learning.draw(results, tmp_path / "figures")
    assert [path.name for path in drawn] == ["learning.svg", "share.svg", "channels.svg"]
    assert all("</svg>" in path.read_text() for path in drawn)
    assert learning.draw(tmp_path / "nothing", tmp_path / "figures") == []
