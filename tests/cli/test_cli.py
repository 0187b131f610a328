"""The command line, called in process: `s2kernels.cli.main([...])`."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from s2kernels import cli
from s2kernels.adapter import read_adapter
from s2kernels.cli import examples, finetune, texts, training
from s2kernels.cli.answers import PROMPT
from s2kernels.cli.models import load_tokenizer
from s2kernels.coupling import channels_of_heads
from s2kernels.peft import S2FTConfig, select_indices

COLOURS = ("red", "green", "blue", "white")
RECORDS = [
    {"instruction": f"Name colour {i % 4}.", "input": "", "output": COLOURS[i % 4], "answer": i}
    for i in range(24)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama on disk that takes the tokens of --tokenizer bytes."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model(
        "llama", torch.float32, vocab_size=259, max_position_embeddings=256, eos_token_id=1
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints at steps 6 and 12."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(base, data, path)
    return path


def train(base, data, output, *options):
    budgets = [] if "--selection" in options else ["--heads", "2", "--channels", "0.2"]
    cli.main(
        ["finetune", "--model", str(base), "--tokenizer", "bytes", "--data", str(data)]
        + ["--output", str(output), *budgets, "--lr", "0.02"]
        + ["--max-steps", "12", "--save-steps", "6", "--batch-size", "4", "--held-out", "0.2"]
        + ["--device", "cpu", *options]
    )


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def logits(model):
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def refused(capsys, *argv) -> str:
    """The one line that is printed where `argv` is refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all("%|" in line for line in lines[:-1]), lines  # progress bars of loading
    return lines[-1]


# ---------------------------------------------------------------------------- selections


@pytest.mark.parametrize(
    "units", ["[0, 0.5]", "[1.0]", "[true, 2]", "[[0, 1], [2, 3]]", '["1"]', "[4294967297]", "3"]
)
def test_a_selection_that_is_not_whole_numbers_is_refused(units, tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text(f'{{"units": {{"layers.0.mlp": {units}}}}}')
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: list of whole numbers wanted"):
        finetune.read_selection(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"units": []}', "{}", "[]", "{"])
def test_what_is_no_selection_is_refused(text, tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="chosen.json is no selection"):
        finetune.read_selection(path)


# ---------------------------------------------------------------------------- finetune


def test_a_run_lowers_the_held_out_loss(trained, base, data):
    metrics = metrics_of(trained)
    curve = metrics["held_out_loss"]
    assert [step for step, _ in curve] == [0, 3, 6, 9, 12]
    assert curve[-1][1] < 0.8 * curve[0][1]
    assert len(metrics["loss"]) == metrics["steps"] == 12
    assert (metrics["examples"], metrics["held_out_examples"]) == (24, 5)
    assert {path.name for path in trained.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer_config.json",
        "metrics.json",
        "run.yaml",
        "loss.svg",
    }
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]

    # the loss reported is the mean over the tokens of the held-out examples
    _, held_out = examples.split(examples.read([str(data)])[0], 0.2, 0)
    model = PeftModel.from_pretrained(load(base), trained).eval()
    total = count = 0
    for record in held_out:
        prompt = PROMPT.format(**record).encode()
        ids = [byte + 3 for byte in prompt + record["output"].encode()] + [1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double()
        answer = torch.tensor(ids[len(prompt) :])
        total += float(torch.nn.functional.cross_entropy(logits, answer, reduction="sum"))
        count += len(answer)
    assert curve[-1][1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(trained, base, data, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(trained / "checkpoint-6", output / "checkpoint-6")
    shutil.copy(trained / "run.yaml", output)
    (output / "checkpoint-9").mkdir()  # cut off while it was written
    train(base, data, output, "--resume")
    left, right = (load_file(path / "adapter_model.safetensors") for path in (trained, output))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    left, right = metrics_of(trained), metrics_of(output)
    assert left.pop("seconds") and right.pop("seconds")
    assert left == right
    assert (trained / "loss.svg").read_bytes() == (output / "loss.svg").read_bytes()


def test_a_run_resumes_with_its_own_options_only(trained, base, data, capsys, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(RECORDS[:12]))
    args = ["finetune", "--model", base, "--tokenizer", "bytes", "--output", trained, "--resume"]
    rest = ["--heads", "2", "--channels", "0.2", "--lr", "0.02", "--batch-size", "4"]
    rest += ["--held-out", "0.2"]
    line = refused(capsys, *args, "--data", data, *rest, "--seed", "1")
    assert "another --seed, 0, not 1" in line
    assert "another --data" in refused(capsys, *args, "--data", other, *rest)
    assert "no checkpoint" in refused(capsys, *args[:-2], tmp_path, "--resume", "--data", data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["instructions", "texts"])
def test_packing_checkpointing_accumulation_and_bf16(kind, base, tmp_path):
    path, output = tmp_path / "data.jsonl", tmp_path / "out"
    records = RECORDS if kind == "instructions" else [{"text": "abab" * 9}] * 8
    path.write_text("\n".join(map(json.dumps, records)))
    options = ["--packing", "--gradient-checkpointing", "--accumulate", "2", "--bf16"]
    train(base, path, output, *options, "--max-steps", "4", "--mode", "additive")
    curve = metrics_of(output)["held_out_loss"]
    assert curve[-1][1] < curve[0][1]
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensors[name].dtype for name in tensors if name.endswith("delta")} == {torch.float32}


# ---------------------------------------------------------------------------- adapters


def test_inspect_reports_the_tensors(trained, capsys):
    cli.main(["inspect", str(trained), "--json"])
    report = json.loads(capsys.readouterr().out)
    tensors = load_file(trained / "adapter_model.safetensors")
    assert len(report["layers"]) == 4
    for entry in report["layers"]:
        prefix = f"base_model.model.{entry['module']}.s2ft_"
        delta, index = tensors[prefix + "delta"], tensors[prefix + "index"]
        assert entry["parameters"] == delta.numel()
        assert entry["bytes"] == delta.nbytes
        assert entry["channels"] == entry["lora_rank"] == len(index) == delta.shape[1]
        assert entry["dim"] == "in"
        if "o_proj" in entry["module"]:
            assert entry["heads"] == sorted({int(channel) // 4 for channel in index})
            assert len(entry["heads"]) == 2
        else:
            assert entry["heads"] is None
    total = sum(value.numel() for name, value in tensors.items() if name.endswith("delta"))
    assert report["total"]["parameters"] == metrics_of(trained)["trained_parameters"] == total

    cli.main(["inspect", str(trained)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and f"{total:,}" in lines[-1]


def test_merge_equals_the_adapter(trained, base, tmp_path):
    output = tmp_path / "merged"
    cli.main(["merge", str(trained), "--output", str(output), "--base", str(base)])
    wanted = logits(PeftModel.from_pretrained(load(base), trained))
    torch.testing.assert_close(logits(load(output)), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(load(base))).abs().max() > 0.1
    assert (output / "tokenizer_config.json").is_file()

    cli.main(["merge", str(trained), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"])
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_the_exported_lora_is_checked(trained, base, tmp_path, capsys):
    output = tmp_path / "lora"
    cli.main(
        ["export-lora", str(trained), "--output", str(output), "--base", str(base), "--check"]
        + ["--rank", "16"]
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("largest logit difference ")
    difference, largest = (float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", line)[:2])
    assert difference <= 1e-6 * max(1, largest)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["weight", "product"])
def test_select_ranks_heads_and_channels(strategy, base, data, tmp_path):
    output = tmp_path / "selection.json"
    args = ["select", "--model", str(base), "--output", str(output), "--strategy", strategy]
    args += ["--heads", "2", "--channels", "0.1", "--smallest", "--device", "cpu"]
    if strategy != "weight":
        args += ["--data", str(data), "--tokenizer", "bytes", "--examples", "2"]
    cli.main(args)
    selection = json.loads(output.read_text())
    assert {name: len(units) for name, units in selection["units"].items()} == {
        f"model.layers.{i}.{block}": num
        for i in range(2)
        for block, num in (("self_attn", 2), ("mlp", 4))
    }
    picture = output.with_suffix(".svg").read_bytes()
    again = tmp_path / "again" / "selection.json"
    cli.main([str(again) if word == str(output) else word for word in args])
    assert again.read_text() == output.read_text()
    assert again.with_suffix(".svg").read_bytes() == picture

    args = ["finetune", "--model", base, "--data", data, "--tokenizer", "bytes", "--device", "cpu"]
    args += ["--output", tmp_path / "out", "--selection", output, "--max-steps", "1"]
    cli.main(list(map(str, args)))
    adapter = read_adapter(tmp_path / "out")
    for i in range(2):
        units = selection["units"]
        heads = torch.tensor(units[f"model.layers.{i}.self_attn"])
        assert torch.equal(
            adapter[f"model.layers.{i}.self_attn.o_proj"].index, channels_of_heads(heads, 4)
        )
        channels = units[f"model.layers.{i}.mlp"]
        assert adapter[f"model.layers.{i}.mlp.down_proj"].index.tolist() == channels

    args[args.index("--output") + 1] = tmp_path / "other"
    for text in ("{}", "nothing", '{"units": {"model.layers.9.mlp": [1]}}'):
        output.write_text(text)
        with pytest.raises(SystemExit) as stop:
            cli.main(list(map(str, args)))
        assert stop.value.code == 2


@pytest.mark.slow
def test_finetune_selects_on_a_share_of_its_training_data(base, data, tmp_path, monkeypatch):
    options = ["--strategy", "activation", "--smallest"]
    train(base, data, tmp_path, *options, "--max-steps", "2", "--save-steps", "1")

    tokenizer = load_tokenizer("bytes")
    records, kind, _ = examples.read([str(data)])
    train_records, _ = examples.split(records, 0.2, 0)
    pairs = examples.for_trainer(train_records, kind, tokenizer, "auto", 256)
    rows = training.tokenized(tokenizer, pairs, 256)
    sample = rows.shuffle(0).select([0])  # 1 % of 19, rounded up
    chosen = select_indices(
        load(base),
        S2FTConfig(heads=2, channels=0.2, selection="activation", largest=False),
        training.batches(sample, tokenizer),
        progress=False,
    )
    adapter = read_adapter(tmp_path)
    assert {name: part.index.tolist() for name, part in adapter.items()} == chosen.indices

    def fail(*args):
        raise AssertionError("a run that goes on has its channels")

    monkeypatch.setattr(finetune.tuners, "select_indices", fail)
    train(base, data, tmp_path, *options, "--max-steps", "3", "--save-steps", "1", "--resume")
    resumed = read_adapter(tmp_path)
    assert {name: part.index.tolist() for name, part in resumed.items()} == chosen.indices
    assert metrics_of(tmp_path)["steps"] == 3


@pytest.mark.slow
def test_a_mixture_goes_through_every_command(data, tmp_path, capsys):
    base = tmp_path / "base"
    sizes = dict(vocab_size=259, max_position_embeddings=256, eos_token_id=1)
    tiny_model("qwen3_moe", torch.float32, **sizes).save_pretrained(base)
    selection = tmp_path / "chosen.json"
    cli.main(
        ["select", "--model", str(base), "--output", str(selection), "--strategy", "product"]
        + ["--heads", "2", "--channels", "3", "--device", "cpu", "--data", str(data)]
        + ["--tokenizer", "bytes", "--examples", "2"]
    )
    units = json.loads(selection.read_text())["units"]["model.layers.1.mlp.experts"]
    assert [unit // 24 for unit in units] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert "experts: 12 of 96 channels" in capsys.readouterr().out
    train(base, data, tmp_path / "adapter", "--selection", str(selection), "--max-steps", "3")
    name = "model.layers.1.mlp.experts.down_proj"
    part = read_adapter(tmp_path / "adapter")[name]
    assert part.index.tolist() == (torch.tensor(units).view(4, 3) % 24).tolist()
    capsys.readouterr()
    cli.main(["inspect", str(tmp_path / "adapter"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    row = next(layer for layer in shown["layers"] if layer["module"] == name)
    assert (row["channels"], row["lora_rank"], row["parameters"]) == (12, 3, 4 * 32 * 3)
    cli.main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    want = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), want, rtol=0, atol=1e-5)
    argv = ["export-lora", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora"), "--check"]
    cli.main(argv)
    line = capsys.readouterr().out.splitlines()[-1]
    assert float(re.search(r"difference ([\d.e-]+),", line)[1]) < 1e-5


# ---------------------------------------------------------------------------- what is refused


def test_mistakes_are_told_in_one_line(base, data, trained, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": }\n')
    fields = tmp_path / "fields.jsonl"
    fields.write_text('{"prompt": "a"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(trained / "adapter_model.safetensors", lora)
    new = tmp_path / "new"
    args = ["finetune", "--model", base, "--output", new, "--tokenizer", "bytes", "--data"]
    small = tmp_path / "small"
    tiny_model("llama").save_pretrained(small)
    capsys.readouterr()
    cases = [
        ([], "the following arguments are required"),
        (["frobnicate"], "invalid choice"),
        (["finetune"], "required"),
        ([*args, tmp_path / "none.json"], "none.json"),
        ([*args, bad], f"{bad}:2: not JSON"),
        ([*args, fields], f"{fields}: fields"),
        ([*args, folder], f"{folder}: a file .json, .jsonl"),
        ([*args, data, "--method", "lora", "--heads", "2"], "--heads goes with --method s2ft"),
        ([*args, data, "--density", "0.1"], "--density goes with --method spiel"),
        ([*args, data, "--method", "spiel", "--optimizer", "sgd"], "one of its own"),
        ([*args, data, "--optimizer", "best"], "best"),
        ([*args, data, "--template", "chat"], "no chat template"),
        ([*args, data, "--config", bad], f"{bad} is not YAML"),
        ([*args, data, "--heads", "9"], "9 wanted of 8"),
        ([*args, data, "--channels", "1.5"], "1.5 wanted"),
        ([*args, data, "--channels", "few"], "invalid count or share value"),
        ([*args, data, "--epochs", "0"], "--epochs"),
        ([*args, data, "--lr", "nan"], "--lr"),
        ([*args, data, "--batch-size", "0"], "--batch-size"),
        ([*args, data, "--held-out", "0.99"], "leaves none"),
        ([*args, data, "--held-out", "24"], "leaves none"),
        ([*args, data, "--smallest"], "ranks by scores"),
        ([*args, data, "--strategy", "best"], "invalid choice"),
        ([*args, data, "--strategy", "weight", "--selection", bad], "does not go with --selection"),
        ([*args, data, "--method", "spiel", "--density", "0"], "share above 0"),
        ([*args, data, "--targets", "no_proj"], "no_proj"),
        ([*args, data, "--targets", "mlp"], "linear"),
        ([*args, data, "--max-length", "999"], "256 positions"),
        ([*args, data, "--max-length", "9"], "leaves no token"),
        ([*args[:5], "--tokenizer", tmp_path, "--data", data], "no tokenizer is in it"),
        ([*args[:5], "--data", data], "no tokenizer is in it"),
        ([*args, data, "--output", trained], "not an empty folder"),
        (["finetune", "--model", tmp_path, *args[3:], data], "has no config.json"),
        (["finetune", "--model", new, *args[3:5], "--data", data], "there is no such folder"),
        (["finetune", "--model", small, *args[3:], data], "259 tokens"),
        (["inspect", tmp_path], "no adapter_config.json"),
        (["inspect", lora], "holds no adapter of S2FT or SpIEL: its type is 'LORA'"),
        (["merge", lora, "--output", new], "holds no adapter of S2FT or SpIEL"),
        (["export-lora", lora, "--output", new, "--base", base], "holds no S2FT adapter"),
        (["merge", tmp_path, "--output", new], "no adapter_config.json"),
        (["merge", trained, "--output", new, "--base", tmp_path], "has no config.json"),
        (["merge", trained, "--output", base], "not an empty folder"),
        (["export-lora", trained, "--output", new, "--rank", "1"], "rank"),
        (["export-lora", trained, "--output", new, "--format", "onnx"], "invalid choice"),
        (["select", "--model", base, "--output", new], ".json"),
        (
            ["select", "--model", base, "--output", tmp_path / "s.json", "--strategy", "gradient"],
            "needs --data",
        ),
    ]
    for argv, message in cases:
        assert message in refused(capsys, *argv), argv
        assert not new.exists(), argv


def test_a_base_of_another_shape_is_refused(trained, tmp_path, capsys):
    tiny_model("llama", torch.float32, hidden_size=16, vocab_size=259).save_pretrained(tmp_path)
    capsys.readouterr()
    argv = ["merge", trained, "--output", tmp_path / "merged", "--base", tmp_path]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    assert stop.value.code == 2
    assert not (tmp_path / "merged").exists()


def test_an_extra_that_is_missing_is_named(data, base, capsys, monkeypatch, tmp_path):
    for name in ("finetune", "models", "examples", "training", "evaluate", "serving"):
        monkeypatch.delitem(sys.modules, f"s2kernels.cli.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = ["finetune", "--model", base, "--data", data, "--output", tmp_path / "new"]
    line = refused(capsys, *argv)
    assert line.endswith("transformers is missing: pip install -e '.[peft]' in the clone")


@pytest.mark.parametrize("command", ["", *texts.TEXTS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: s2kernels")
    assert not command or "example" in shown
