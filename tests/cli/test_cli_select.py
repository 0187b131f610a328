"""`s2kernels select` keeps what it has computed, and what was there."""

import json
import sys

import pytest
import torch
from tiny_models import tiny_model

import s2kernels.select
from s2kernels import cli
from s2kernels.cli import figures

PARTS = ("self_attn", "mlp")


@pytest.fixture
def argv(tmp_path) -> list[str]:
    """select, of a tiny Llama, into new/chosen.json."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    argv = ["select", "--model", str(tmp_path / "base"), "--heads", "2", "--channels", "3"]
    return [*argv, "--device", "cpu", "--output", str(tmp_path / "new" / "chosen.json")]


def units_in(folder):
    return json.loads((folder / "chosen.json").read_text())["units"]


def test_without_matplotlib_there_is_a_note_and_no_picture(argv, tmp_path, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli.main(argv)
    out = capsys.readouterr().out
    assert "note: no chosen.svg, which needs matplotlib" in out
    assert out.endswith(f"selection in {tmp_path / 'new' / 'chosen.json'}\n")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["chosen.json"]
    assert [len(units) for units in units_in(tmp_path / "new").values()] == [2, 3, 2, 3]


def test_channels_are_selected_in_runs(argv, tmp_path):
    """Runs of channels, beside single heads."""
    cli.main([*argv, "--granularity", "8"])
    units = units_in(tmp_path / "new")
    assert list(units) == [f"model.layers.{i}.{part}" for i in (0, 1) for part in PARTS]
    values = s2kernels.select.scores(tiny_model("llama", torch.float32), "weight")
    for name, chosen in units.items():
        if name.endswith("mlp"):  # 3 channels are rounded up to one run
            runs = values[name].view(5, 8).square().sum(1)
            start = 8 * int(runs.argmax())
            assert chosen == list(range(start, start + 8))
        else:
            assert chosen == sorted(values[name].topk(2).indices.tolist())
    assert json.loads((tmp_path / "new" / "chosen.json").read_text())["granularity"] == 8


def test_a_picture_that_fails_leaves_the_selection(argv, tmp_path, monkeypatch):
    def fail(figure, path):
        path.write_text("<svg")
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "_save", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 130
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["chosen.json"]
    assert len(units_in(tmp_path / "new")) == 4


@pytest.mark.parametrize("name", ["chosen.json", "chosen.svg"])
def test_a_file_that_is_there_is_refused_before_any_score(
    name, argv, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(s2kernels.select, "scores", None)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert f"--output: {tmp_path / 'new' / name} exists" in capsys.readouterr().err
    assert (tmp_path / "new" / name).read_text() == "mine"
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]
