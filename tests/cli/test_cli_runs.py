"""A run of `s2kernels finetune` that has hardly begun, and one whose channels are given."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import SafetensorError
from tiny_models import tiny_model
from transformers import PreTrainedModel

import s2kernels.adapter
from s2kernels import cli
from s2kernels.adapter import read_adapter
from s2kernels.cli import runs, training
from s2kernels.peft import S2FTConfig, indices_of


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """finetune for one step; what is missing is --output."""
    path = tmp_path_factory.mktemp("data")
    (path / "data.jsonl").write_text('{"text": "abcdefg"}\n' * 4)
    tiny_model("llama", torch.float32, vocab_size=259).save_pretrained(path / "base")
    argv = ["finetune", "--model", str(path / "base"), "--tokenizer", "bytes"]
    return argv + ["--data", str(path / "data.jsonl"), "--max-steps", "1", "--device", "cpu"]


def stopped(capsys, *argv):
    """The exit code and the last line on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, argv)))
    return stop.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    argv, tmp_path, capsys, monkeypatch
):
    def interrupted(trainer, **options):
        (tmp_path / "checkpoint-1").mkdir()  # half way through the writing of it
        raise KeyboardInterrupt

    argv = [*argv, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(training.Completions, "train", interrupted)
        code, line = stopped(capsys, *argv)
    assert code == 130 and line == "interrupted: no checkpoint yet; begin anew"
    (tmp_path / ".writing-left").mkdir()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"run.yaml", "checkpoint-1", ".writing-left"}
    code, line = stopped(capsys, *argv, "--resume")
    assert code == 2 and line.endswith(f"there is no checkpoint in {tmp_path}: leave it out")

    cli.main([*argv, "--heads", "3", "--granularity", "8"])
    options = runs.read_settings(tmp_path)
    assert (options["heads"], options["granularity"]) == (3, 8)
    parts = read_adapter(tmp_path)
    assert len(parts["model.layers.0.self_attn.o_proj"].index) == 3 * 4
    channels = parts["model.layers.0.mlp.down_proj"].index
    assert len(channels) == 8 and channels[0] % 8 == 0 and (channels.diff() == 1).all()
    code, line = stopped(capsys, *argv)
    assert code == 2 and line.endswith("exists and is not an empty folder")


def test_an_interrupted_run_names_its_last_checkpoint(argv, tmp_path, capsys, monkeypatch):
    def interrupted(trainer, **options):
        for step in (3, 12):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Completions, "train", interrupted)
    code, line = stopped(capsys, *argv, "--output", tmp_path)
    assert code == 130 and line == "interrupted: --resume goes on from checkpoint-12"
    code, line = stopped(capsys, *argv, "--output", tmp_path)
    assert code == 2 and line.endswith("exists and is not an empty folder")


@pytest.mark.parametrize(
    ("others", "options", "fits"),
    [
        ([], None, True),
        ([], "ours", True),
        (["checkpoint-3", ".writing-x"], "ours", True),
        (["checkpoint-3"], None, False),
        ([], "- mine", False),
        ([], "[]", False),
        (["notes.txt"], "ours", False),
        (["adapter_config.json"], "ours", False),
        (["checkpoint-3", "checkpoint-3/trainer_state.json"], "ours", False),
    ],
)
def test_what_is_not_a_runs_own_is_not_written_over(others, options, fits, tmp_path):
    if options is not None:
        ours = "method: s2ft\n"
        (tmp_path / "run.yaml").write_text(ours if options == "ours" else options)
    for name in others:
        if "." in name[1:]:
            (tmp_path / name).write_text("{}")
        else:
            (tmp_path / name).mkdir()
    if fits:
        runs.check_new(tmp_path)
        return
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        runs.check_new(tmp_path)


def test_a_folder_is_new_or_no_file(tmp_path):
    runs.check_new(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        runs.check_new(tmp_path / "file")


@pytest.mark.parametrize(
    "option",
    [
        *(
            ["--heads", "0.05"],
            ["--channels", "7"],
            ["--granularity", "1"],
            ["--scope", "layer"],
            ["--smallest"],
        ),
        ["--strategy", "random"],
    ],
    ids=lambda option: option[0],
)
def test_a_selection_goes_with_no_other_choice(option, argv, tmp_path, capsys):
    new = tmp_path / "new"
    given = ["--output", new, "--selection", tmp_path / "there_is_none.json", *option]
    code, line = stopped(capsys, *argv, *given)
    assert code == 2 and "--selection" in line and option[0] in line
    assert "there_is_none" not in line and not new.exists()


def test_a_selection_is_not_said_to_be_a_draw(argv, tmp_path):
    units = {f"model.layers.{i}.{name}": [6, 1] for i in (0, 1) for name in ("self_attn", "mlp")}
    (tmp_path / "chosen.json").write_text(json.dumps({"units": units}))
    output = tmp_path / "out"
    argv = [*argv, "--output", str(output), "--selection", str(tmp_path / "chosen.json")]
    cli.main([*argv, "--save-steps", "1"])
    model = tiny_model("llama", vocab_size=259)
    given = {name: torch.tensor(chosen) for name, chosen in units.items()}
    want = indices_of(model, S2FTConfig(), given)
    assert {name: part.index.tolist() for name, part in read_adapter(output).items()} == want
    card = (output / "README.md").read_text()
    assert "(given by their indices)" in card and "selection random" not in card
    options = runs.read_settings(output)
    assert not options.keys() & set(runs.CHOICE)

    argv[argv.index("--max-steps") + 1] = "2"
    cli.main([*argv, "--resume"])
    assert {name: part.index.tolist() for name, part in read_adapter(output).items()} == want


FULL = {
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "file": OSError(28, "No space left on device"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_told_in_one_line(kind, argv, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise FULL[kind]

    with monkeypatch.context() as patch:
        patch.setattr(training.Completions, "train", full)
        code, line = stopped(capsys, *argv, "--output", tmp_path / "run")
    assert code == 2 and "finetune: error: " in line and "no space left on the disk" in line

    base = tiny_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, S2FTConfig(heads=1, channels=1)).save_pretrained(tmp_path / "adapter")
    files = [tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "merged"]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        code, line = stopped(capsys, "merge", *files)
    assert code == 2 and "merge: error: " in line and "no space left on the disk" in line.lower()
    with monkeypatch.context() as patch:
        patch.setattr(s2kernels.adapter, "save_file", full)
        code, line = stopped(capsys, "export-lora", *files)
    assert code == 2 and "no space left on the disk" in line


def test_another_fault_of_the_training_keeps_its_traceback(argv, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("some fault")

    monkeypatch.setattr(training.Completions, "train", fail)
    with pytest.raises(RuntimeError, match="some fault"):
        cli.main([*argv, "--output", str(tmp_path / "run")])


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(argv, tmp_path, capsys):
    output = tmp_path / "run"
    cli.main([*argv, "--output", str(output)])
    checkpoint = output / "checkpoint-1"
    data = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "adapter_model.safetensors").write_bytes(data)
    code, line = stopped(capsys, *argv, "--output", output, "--resume", "--max-steps", "2")
    assert code == 2 and "checkpoint-1/adapter_model.safetensors is damaged" in line
