"""The studies of bench/learning at toy size: a tiny Llama with random weights, made-up problems."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.learning import __main__ as learning
from bench.learning import data, evaluate, runs, studies
from bench.learning.data import Example
from bench.learning.protocol import RATES, SMALL, TOY
from bench.learning.runs import Bench, Run
from bench.learning.store import Store

END = "<end>"


def bytes_tokenizer():
    """A token for each byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([END, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def toy_model():
    """Wide enough for three tasks with channels of their own."""
    sizes = {"hidden_size": 64, "intermediate_size": 400, "max_position_embeddings": 512}
    return tiny_model("llama", torch.float32, vocab_size=257, **sizes)


def problem(number, names="Ann and Bob"):
    total = {"output": f"\nA: It is {number + 2}. The answer is {number + 2}."}
    text = f"{names} have {number} and 2. In all?"
    return {"instruction": text, "input": "", "answer": f"{number + 2}.0"} | total


def question(number):
    text = f"Choose: Is {number}?\n\nAnswer1: no Answer2: yes Answer3: so\n\nAnswer format: 1"
    answer = f"answer{number % 3 + 1}"
    output = f"the correct answer is {answer}"
    return {"instruction": text, "input": "", "output": output, "answer": answer}


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """(folder of the model, folder of the data)"""
    root = tmp_path_factory.mktemp("learning")
    model, folder = root / "model", root / "data"
    toy_model().save_pretrained(model)
    bytes_tokenizer().save_pretrained(model)
    folder.mkdir()
    files = {
        # the first two are in the tests
        "math_train.json": [problem(n) for n in range(2)] + [problem(n, "Cy") for n in range(20)],
        "svamp_test.json": [problem(n) for n in range(8)],
        "gsm8k_test.json": [problem(n, "Di") for n in range(8)],
        "arc_easy_train.json": [question(n) for n in range(10, 30)],
        "arc_easy_test.json": [question(n) for n in range(9)],
    }
    for name, records in files.items():
        (folder / name).write_text(json.dumps(records))
    return model, folder


@pytest.fixture(scope="session")
def bench(places):
    """A Bench as the command makes one, at toy size."""
    _, folder = places
    model = toy_model().requires_grad_(False)
    tokenizer = bytes_tokenizer()
    return Bench(model, tokenizer, data.load(folder, tokenizer, TOY), TOY)


def test_packed_sequences_do_not_see_each_other(bench):
    examples = bench.material.tests["easy"]
    pairs = [(e.prompt, e.answer) for e in examples]
    together = evaluate.sequence_losses(bench.base, pairs)
    for (prompt, answer), packed in zip(pairs, together, strict=True):
        logits = bench.base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
        alone = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(answer), reduction="sum"
        )
        assert float(packed) == pytest.approx(float(alone), rel=1e-5)


def test_problems_of_the_tests_are_not_trained_on(bench):
    notes = bench.material.notes
    assert notes["math problems"] == 22 and notes["math problems that are in a test"] == 2
    task = bench.material.tasks["math"]
    assert len(task.train) + len(task.validation) == 20
    prompts = {tuple(e.prompt) for e in task.train + task.validation}
    assert len(prompts) == 20  # none is in both
    assert not prompts & {tuple(e.prompt) for e in bench.material.tests["easy"]}


def test_an_answer_is_encoded_after_its_question(bench):
    example = data.encode(problem(5), bench.tokenizer)
    text = bench.tokenizer.decode(example.prompt)
    assert text == "Q: Ann and Bob have 5 and 2. In all?\nA:"
    answer = bench.tokenizer.decode(example.answer)
    assert answer == f" It is 7. The answer is 7.{END}" and example.expected == "7.0"


def test_questions_have_the_texts_of_their_answers(bench):
    found = data._questions([question(4)] * 4, bench.tokenizer, TOY)[0]
    assert [bench.tokenizer.decode(option) for option in found.options] == [" no", " yes", " so"]
    assert bench.tokenizer.decode(found.prompt) == "Q: Is 4?\nA:" and found.right == 1


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("That is 3 + 4 = 7. The answer is 7.", "7.0", True),
        ("1,250", "1250.0", True),
        ("-3", "3.0", False),
        ("The answer is 2.5.", "2.5", True),
        ("none", "0.0", False),
    ],
)
def test_the_last_number_is_the_answer(text, expected, right):
    assert evaluate.is_answer(text, expected) is right


def test_a_model_that_has_learnt_one_choice_is_right_where_it_is(bench):
    """Trained on "answer2" alone, it must be right on such questions and wrong on others."""
    learnt, other = (data.encode(question(n), bench.tokenizer) for n in (1, 2))
    before = evaluate.answer_loss(bench.base, [learnt])
    run = Run("full", 1e-2)
    method = bench.method(run, bench.base, "math", 0)
    for _ in range(30):
        runs.fit(method, [[learnt]], run, TOY)
    assert evaluate.answer_loss(method.model, [learnt]) < 0.1 * before
    assert evaluate.choice(method.model, [learnt, other], bench.tokenizer) == 0.5


@pytest.mark.slow
def test_decoding_finds_what_was_learnt(bench):
    example = Example(bench.tokenizer("Q: x\nA:")["input_ids"], bench.tokenizer(" 42")["input_ids"])
    example = Example(example.prompt, example.answer + [bench.tokenizer.eos_token_id], "42")
    other = Example(example.prompt[:3], example.answer, "41")
    method = bench.method(Run("full", 1e-2), bench.base, "math", 0)
    for _ in range(40):
        runs.fit(method, [[example]], Run("full", 1e-2), TOY)
    examples = [example, other, example]
    found = evaluate.exact_answers(method.model.eval(), examples, bench.tokenizer, TOY)
    assert found == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", studies.ENTRANTS)
def test_every_entrant_trains_and_leaves_the_base_alone(bench, name):
    before = {n: p.clone() for n, p in bench.base.named_parameters()}
    found = bench.perform(studies.ENTRANTS[name])
    assert len(found["losses"]) == TOY.steps
    for parameter_name, parameter in bench.base.named_parameters():
        assert torch.equal(parameter, before[parameter_name])
    run = replace(studies.ENTRANTS[name], lr=3e-3)
    merged, trained = bench.trained(run, bench.base, "math", 0)
    moved = sum(
        int((a != b).sum())
        for a, b in zip(merged.parameters(), bench.base.parameters(), strict=True)
    )
    assert moved > 0
    if run.method in ("s2ft", "spiel", "shira"):  # what is trained are entries of the weights
        assert moved <= trained["trained parameters"] * (3 if run.method == "spiel" else 1)


def test_channels_of_disjoint_tasks_are_disjoint_and_shared_ones_are_the_same(bench):
    def channels(disjoint, part):
        run = Run("s2ft", projections=runs.DOWN, units=(1, 6), disjoint=disjoint)
        method = bench.method(run, bench.base, "math", part)
        return {n: set(i) for n, i in method.config.indices.items()}

    first, second = channels(True, 0), channels(True, 1)
    assert first.keys() == second.keys() and len(first) == 2
    assert all(len(first[n]) == 6 and not first[n] & second[n] for n in first)
    assert channels(False, 1) == channels(False, 0) == first


def test_too_few_channels_for_disjoint_tasks_are_refused(bench):
    run = Run("s2ft", projections=runs.DOWN, units=(1, 250), disjoint=True)
    with pytest.raises(ValueError, match="has 400 units, 500 are wanted"):
        bench.method(run, bench.base, "math", 1)


def test_fusion_of_one_task_with_weight_one_is_that_task(bench):
    run = Run("s2ft", 3e-3, kind="fuse", tasks=("math",), projections=runs.DOWN)
    found = bench.perform(run)
    alone, fused = found["alone"]["math"]["tasks"], found["fused"]["1.0"]
    assert fused["math"] == pytest.approx(alone["math"], rel=1e-3)
    assert found["fused"]["0.5"]["math"]["validation loss"] != fused["math"]["validation loss"]


def test_the_rate_warms_up_and_falls():
    factors = [runs.rate(step, SMALL) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, pytest.approx(36 / 37)]
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True) and factors[-1] > 0


def test_every_problem_comes_once_before_any_comes_twice():
    examples = [Example([n], [n]) for n in range(7)]
    order = [e.prompt[0] for step in runs.batches(examples, 3, TOY) for e in step]
    assert len(order) == 8 and sorted(order[:7]) == list(range(7))
    assert order != [e.prompt[0] for s in runs.batches(examples, 4, TOY) for e in s]


def test_the_rate_is_chosen_by_validation_alone():
    def finder(losses):
        tried = dict(zip((*RATES, 0.009), losses, strict=True))
        tests = {"easy loss": random.random()}
        return lambda run: {"validation loss": tried[run.lr], "measures": tests}

    within, above = finder((0.9, 0.7, 0.8, 0.1)), finder((0.9, 0.8, 0.7, 0.6))
    assert studies.beyond([Run("lora")], within) == []
    assert studies.tuned(Run("lora"), within).lr == RATES[1]
    assert [run.lr for run in studies.beyond([Run("lora")], above)] == [0.009]
    assert studies.tuned(Run("lora"), above).lr == 0.009
    assert studies.tuned(Run("lora"), finder((0.9, 0.8, 0.7, 0.75))).lr == RATES[-1]
    with pytest.raises(ValueError, match="bench.learning learn"):
        studies.tuned(Run("lora"), lambda run: None)


def arguments(places, folder, study, *more):
    model, material = places
    named = {"--model": model, "--data": material, "--results": folder}
    return [study, "--toy", *(str(w) for item in named.items() for w in item), *more]


@pytest.fixture(scope="module")
def results(places, tmp_path_factory):
    """A folder with the results of every study, at one seed and one rate; each is called twice."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RATES", "FULL_RATES", "MOMENTUM_RATES"):
            patch.setattr(studies, name, (1e-3,))
        patch.setattr(studies, "SEEDS", (0,))
        patch.setattr(studies, "RANKS", (1,))
        patch.setattr(studies, "DENSITIES", (0.01,))
        patch.setattr(studies, "PROJECTIONS", ("k_proj", "up_proj", "down_proj"))
        for study in studies.STUDIES:
            assert learning.main(arguments(places, folder, study)) == 0
            path = folder / f"{study}.json"
            before = path.read_bytes()
            assert learning.main(arguments(places, folder, study, "--resume")) == 0
            assert path.read_bytes() == before  # nothing was left to do
    return folder


@pytest.mark.slow
def test_files_are_whole_and_hold_what_was_asked(results):
    document = json.loads((results / "learn.json").read_text())
    assert {"machine_info", "left out", "runs"} <= document.keys()
    found = [entry["run"] for entry in document["runs"]]
    assert len({json.dumps(run) for run in found}) == len(found)
    rates = {run["lr"] for run in found if run["method"] == "dora"}
    assert rates <= {1e-3, 3e-3} and 1e-3 in rates
    channels = json.loads((results / "channels.json").read_text())["runs"]
    assert len(channels) == 8  # the random ones are those of study learn
    memory = json.loads((results / "memory.json").read_text())["runs"]
    at_work = [entry["result"] for entry in memory if entry["run"].get("kind") == "bytes"]
    assert all(r["open"] >= r["closed"] >= r["least"] > 0 for r in at_work)
    overlap = json.loads((results / "overlap.json").read_text())["runs"][0]["result"]
    assert all(0 <= each["overlap"] <= 1 for each in overlap["overlap"])
    most = [each["energy"] for each in overlap["energy"] if each["channels"] == "most energy"]
    assert all(each["energy"] <= max(most) for each in overlap["energy"])


@pytest.mark.slow
def test_a_budget_ends_a_study_between_runs_and_resume_goes_on(places, tmp_path, capsys):
    toy = arguments(places, tmp_path, "learn", "--budget-s", "0.001")
    assert learning.main(toy) == 3
    assert "out of time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        (tmp_path / "learn.json").write_text('{"runs": []}')
        learning.main(toy)
    assert "--resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nowhere"), "--model must be a folder with a model"),
        (("--data", "nowhere"), "--data must hold math_train.json"),
        (("--budget-s", "0"), "--budget-s must be above 0"),
    ],
)
def test_what_is_missing_is_named(places, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit):
        learning.main(arguments(places, tmp_path, "learn", *change))
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_needs_the_rates_of_another_says_so(places, tmp_path, capsys):
    with pytest.raises(SystemExit):
        learning.main(arguments(places, tmp_path, "channels"))
    assert "python -m bench.learning learn" in capsys.readouterr().err


@pytest.mark.slow
def test_without_data_the_docstrings_are_trained_on(places, bench):
    material = data.load(None, bench.tokenizer, TOY)
    assert set(material.tasks) == {"docs"} and not material.tests
    alone = Bench(bench.base, bench.tokenizer, material, TOY)
    found = alone.perform(learning.on_what_there_is(Run("lora", 1e-3), alone))
    assert found["measures"].keys() == {"text loss"} and found["validation loss"] > 0
    with pytest.raises(ValueError, match="needs --data: it trains on choice, math"):
        alone.perform(Run("lora", 1e-3, kind="fuse", tasks=("math", "choice")))


def test_runs_of_another_protocol_are_not_found(tmp_path):
    (tmp_path / "theory.json").write_text('{"bounds": []}')  # has no runs
    store = Store(tmp_path, {"protocol": {"steps": 1}})
    store.add("learn", Run("lora", 1e-3).key(), {"validation loss": 1.0}, {})
    again = Store(tmp_path, {"protocol": {"steps": 1}})
    assert again.find(Run("lora", 1e-3).key()) == {"validation loss": 1.0}
    assert again.find(Run("lora", 3e-3).key()) is None
    assert Store(tmp_path, {"protocol": {"steps": 2}}).find(Run("lora", 1e-3).key()) is None


def test_other_seeds_are_the_runs_at_every_seed_but_the_first():
    found = studies.seeded([Run("lora", 1e-3), Run("full", 1e-4)])
    assert [(run.method, run.seed) for run in found] == [
        *(("lora", 1), ("full", 1)),
        *(("lora", 2), ("full", 2)),
    ]
