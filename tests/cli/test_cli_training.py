"""`s2kernels finetune` with other data, other methods, several processes, and after SIGKILL."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import tiny_model

from s2kernels import cli
from s2kernels.cli import answers, examples, training
from s2kernels.cli.models import load_tokenizer

ROWS = [
    {"instruction": f"Add {i} and {i % 3}.", "input": "", "output": f"It is {i + i % 3}"}
    for i in range(20)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model(
        "llama", torch.float32, vocab_size=259, max_position_embeddings=512, eos_token_id=1
    ).save_pretrained(path)
    return path


def arguments(base, data, output, *options) -> list[str]:
    names = [str(name) for name in (data if isinstance(data, list) else [data])]
    argv = ["finetune", "--model", str(base), "--tokenizer", "bytes", "--data", *names]
    argv += ["--output", str(output), "--lr", "0.02", "--batch-size", "4", "--device", "cpu"]
    return [*argv, *map(str, options)]


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows)
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(text if path.suffix == ".json" else lines)
    return path


# ---------------------------------------------------------------------------- data


def test_files_of_every_format_have_the_same_records(tmp_path):
    (tmp_path / "folder").mkdir()
    names = ["a.json", "b.jsonl", "c.csv", "folder/d.parquet"]
    paths = [write(tmp_path / name, ROWS) for name in names]
    sources = [str(paths[0].parent), str(paths[3])]
    records, kind, left_out = examples.read([*map(str, paths[:3]), str(paths[3].parent)])
    assert kind == "instruction" and left_out == 0 and len(records) == 80
    for start in range(0, 80, 20):
        assert records.select(range(start, start + 20)).to_list() == ROWS
    assert len(examples.read(sources)[0]) == 100  # the folder has all four


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_empty_outputs_are_left_out_and_counted(suffix, tmp_path):
    rows = [*ROWS[:3], ROWS[3] | {"output": ""}, ROWS[4] | {"output": " \n"}]
    path = write(tmp_path / f"data{suffix}", rows)
    records, _, left_out = examples.read([str(path)])
    assert records["output"][:] == [row["output"] for row in ROWS[:3]] and left_out == 2
    with pytest.raises(ValueError, match="record 4: 'output' is empty"):
        examples.read([str(path)], strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": "b"\n', ":2: not JSON"),
        ('[\n{"text": "a"},\n{"text" "b"}]', ":3: not JSON"),
        ('{"text": "a"}\n' + "[" * 100_000, ":2: not JSON"),
        ('{"prompt": "b"}', "got ['prompt']"),
        ('{"instruction": "a", "output": ["b"]}', "record 1: 'output' must be a text"),
        ('{"messages": "a"}', "record 1: 'messages' must be a list of messages"),
        ('{"text": ""}', "every example has an empty field"),
        ("[]", "holds no examples"),
        ("\n", "holds no examples"),
    ],
)
def test_faults_of_a_file_are_named(text, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        examples.read([str(path)])
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_records_of_two_kinds_are_refused(tmp_path):
    paths = [write(tmp_path / "a.json", ROWS), write(tmp_path / "b.json", [{"text": "a"}])]
    with pytest.raises(ValueError, match="one kind of records wanted, got instruction, text"):
        examples.read(list(map(str, paths)))


def test_numbers_are_texts(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "1 + 1 = ", "completion": 2}])
    assert examples.read([str(path)])[0][0] == {"prompt": "1 + 1 = ", "completion": "2"}


class Chat:
    """What of a tokenizer is asked before it is called."""

    chat_template, eos_token_id = "there is one", None


def test_every_answer_of_the_assistant_is_an_example(tmp_path):
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    ours = write(tmp_path / "a.json", [{"messages": turns}])
    roles = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in turns]
    theirs = write(tmp_path / "b.json", [{"conversations": theirs}])
    for path in (ours, theirs):
        records, kind, _ = examples.read([str(path)])
        made = examples.for_trainer(records, kind, Chat(), "auto", 99).to_list()
        assert made == [
            {"prompt": turns[:1], "completion": turns[1:2]},
            {"prompt": turns[:3], "completion": turns[3:]},
        ]
    with pytest.raises(ValueError, match="no chat template"):
        examples.for_trainer(records, kind, load_tokenizer("bytes"), "auto", 99)


def test_the_loss_is_on_the_output_alone():
    tokenizer = load_tokenizer("bytes")
    row = {"instruction": "Say hé.", "input": "now", "output": "\nhé"}
    for context in ("", "now"):
        records = datasets.Dataset.from_list([row | {"input": context}])
        pairs = examples.for_trainer(records, "instruction", tokenizer, "auto", 512)
        (made,) = training.tokenized(tokenizer, pairs, 512)
        template = answers.PROMPT_WITH_INPUT if context else answers.PROMPT
        prompt, output = template.format(**row).encode(), "hé".encode()
        assert made["input_ids"] == [byte + 3 for byte in prompt + output] + [1]
        assert made["labels"] == [-100] * len(prompt) + [byte + 3 for byte in output] + [1]
        assert not len(training.tokenized(tokenizer, pairs, len(prompt)))


def test_a_text_is_learnt_whole_and_split():
    records = datasets.Dataset.from_list([{"text": "abcdefg"}, {"text": "ab"}])
    rows = examples.for_trainer(records, "text", load_tokenizer("bytes"), "auto", 3)
    rows = training.tokenized(load_tokenizer("bytes"), rows, 3)
    runs = [[100, 101, 102], [103, 104, 105], [106, 1], [100, 101, 1]]
    assert rows["input_ids"][:] == runs
    assert rows["labels"][:] == [[-100, *run[1:]] for run in runs]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 2 = 4. The answer is 1,004.0.", "1004", True),
        ("4 apples", "4.0", True),
        ("-3", "3", False),
        ("no number", "3", False),
        ("the correct answer is Answer1.", "answer1", True),
        ("answer1 or answer2", "answer1", False),
        (" Paris\n", "paris", True),
    ],
)
def test_right_answers(text, answer, right):
    assert answers.is_right(text, answer) == right


# ---------------------------------------------------------------------------- methods


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spiel", "lora"])
def test_other_methods_learn_resume_and_are_evaluated(method, base, tmp_path, capsys):
    rows = [row | {"answer": row["output"].split()[-1]} for row in ROWS]
    data = write(tmp_path / "data.json", rows)
    own = ["--density", "0.05"] if method == "spiel" else ["--rank", "4"]
    options = ["--method", method, *own, "--held-out", "4", "--save-steps", "4"]
    options += ["--weight-decay", "0.01", "--scheduler", "cosine", "--max-steps"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    cli.main(arguments(base, data, whole, *options, "8"))
    (parted).mkdir()
    for name in ("run.yaml", "checkpoint-4"):
        os.symlink(whole / name, parted / name)
    cli.main(arguments(base, data, parted, *options, "8", "--resume"))
    left, right = metrics_of(whole), metrics_of(parted)
    assert left["held_out_loss"] == right["held_out_loss"] and left["loss"] == right["loss"]
    assert left["held_out_loss"][-1][1] < left["held_out_loss"][0][1]
    capsys.readouterr()
    cli.main(
        ["evaluate", "--adapter", str(whole), "--data", str(data), "--model", str(base), "--json"]
        + ["--tokenizer", "bytes", "--max-new-tokens", "4", "--device", "cpu"]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 20 and 0 <= found["adapter"]["right"] <= 20
    assert found["tokens"] == sum(len(row["output"]) + 1 for row in ROWS)
    assert found["adapter"]["loss"] < found["base"]["loss"]


def test_preferences_are_learnt_by_dpo(base, tmp_path):
    rows = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "No"} for r in ROWS]
    data = write(tmp_path / "data.jsonl", rows)
    cli.main(arguments(base, data, tmp_path / "out", "--max-steps", "4", "--held-out", "4"))
    curve = metrics_of(tmp_path / "out")["held_out_loss"]
    assert curve[0][1] == pytest.approx(0.6931, abs=1e-3) and curve[-1][1] < 0.6
    argv = ["evaluate", "--adapter", tmp_path / "out", "--data", data, "--model", base]
    with pytest.raises(SystemExit):
        cli.main(list(map(str, argv)))


@pytest.mark.slow
def test_a_run_is_repeated_from_its_yaml(base, tmp_path):
    data = write(tmp_path / "data.json", ROWS)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    cli.main(arguments(base, data, first, "--max-steps", "3", "--held-out", "4", "--heads", "2"))
    config = ["finetune", "--config", str(first / "run.yaml")]
    cli.main([*config, "--output", str(again)])
    left, right = metrics_of(first), metrics_of(again)
    assert left.pop("seconds") and right.pop("seconds") and left == right
    cli.main([*config, "--output", str(other), "--lr", "0.01", "--epochs", "0.5"])
    options = metrics_of(other)["options"]
    assert (options["lr"], options["epochs"], options["heads"]) == (0.01, 0.5, 2)
    assert options["data"] == left["options"]["data"] and "max_steps" not in options


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(
        *("llama", torch.float32),
        **dict(vocab_size=259, max_position_embeddings=512, eos_token_id=1),
        **dict(hidden_size=64, intermediate_size=128),
    ).save_pretrained(tmp_path / "base")
    data = write(tmp_path / "data.json", ROWS)
    options = [f"--load-in-{bits}bit", "--max-steps", "8", "--held-out", "4"]
    cli.main(arguments(tmp_path / "base", data, tmp_path / "out", *options))
    metrics = metrics_of(tmp_path / "out")
    assert metrics["loss"][0][1] == pytest.approx(metrics["held_out_loss"][0][1], rel=0.2)
    assert metrics["held_out_loss"][-1][1] < metrics["held_out_loss"][0][1]


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "gpt_neox", "gemma2")]


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_packed_examples_have_the_loss_they_have_alone(kind, tmp_path):
    sizes = dict(vocab_size=259, max_position_embeddings=512, eos_token_id=1)
    tiny_model(kind, torch.float32, **sizes).save_pretrained(tmp_path / "base")
    data = write(tmp_path / "data.json", [{"text": text} for text in ("abcd", "efg", "h" * 9)])
    losses = []
    for options in ([], ["--packing"]):
        output = tmp_path / ("packed" if options else "alone")
        options += ["--max-steps", "1", "--held-out", "0", "--max-length", "32"]
        cli.main(arguments(tmp_path / "base", data, output, *options))
        losses.append(metrics_of(output)["loss"][0][1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_mixes_packed_examples_is_refused(tmp_path, capsys):
    sizes = dict(vocab_size=259, max_position_embeddings=512, eos_token_id=1)
    tiny_model("opt", torch.float32, **sizes).save_pretrained(tmp_path / "base")
    data = write(tmp_path / "data.json", [{"text": text} for text in ("abcd", "efg", "h" * 9)])
    options = ["--packing", "--held-out", "0", "--max-length", "32"]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments(tmp_path / "base", data, tmp_path / "out", *options))
    assert stop.value.code == 2
    assert "opt does not keep packed examples apart" in capsys.readouterr().err


# ---------------------------------------------------------------------------- processes


def environment():
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_train_as_one_does(base, tmp_path, capsys):
    data = write(tmp_path / "data.json", ROWS)
    options = ["--max-steps", "3", "--held-out", "5", "--batch-size"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    argv = arguments(base, data, tmp_path / "two", *options, "2")
    port = str(random.SystemRandom().randrange(20000, 60000))
    out = subprocess.run(
        [*run, port, "-m", "s2kernels", *argv],
        **dict(env=environment(), capture_output=True, text=True, timeout=240),
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.count("held-out loss") == out.stdout.count("adapter in") == 1
    cli.main(arguments(base, data, tmp_path / "one", *options, "4"))
    two, one = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    for name, most in (("loss", 1e-5), ("held_out_loss", 1e-6)):
        for (_, left), (_, right) in zip(two[name], one[name], strict=True):
            assert abs(left - right) <= most
    with pytest.raises(SystemExit):
        cli.main([*arguments(base, data, tmp_path / "two", *options, "2"), "--resume"])
    assert "began with another --num-processes, 2, not 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_loss(base, tmp_path):
    data = write(tmp_path / "data.json", ROWS)
    options = ["--max-steps", "12", "--save-steps", "2", "--held-out", "4"]
    cli.main(arguments(base, data, tmp_path / "whole", *options))
    argv = arguments(base, data, tmp_path / "killed", *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "s2kernels", *argv], env=environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.SystemRandom().random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "killed" / "metrics.json").exists():  # else it was done already
        cli.main([*argv, "--resume"])
    whole, killed = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed")
    assert whole["held_out_loss"] == killed["held_out_loss"] and whole["loss"] == killed["loss"]
