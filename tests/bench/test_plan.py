"""Plans of many GPUs: bytes and collectives as by hand, activations as a real forward has them."""

import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bench.measure import memory
from bench.methods import METHODS
from bench.plan import rank
from bench.plan.command import main
from bench.plan.times import CLUSTERS, LABORATORY, Cluster, defaults, seconds
from bench.predict import predict
from bench.steps.cases import Case
from bench.steps.model_shapes import Shape
from bench.steps.work import Ceilings
from s2kernels.peft import S2FTConfig

# 97 tokens and 6 heads of 16 for 48 channels: shards have padding, and one rank more than another.
SHAPE = Shape("grouped", "llama", 48, 104, 2, 6, 2, 16, 97, 2, 97)
BATCH, LENGTH, RANK = 3, 10, 5
count = cache(rank.count)  # several tests look at one plan
HEADS, CHANNELS = 1, 2  # 5 % of 6 heads, 2 % of 104 channels


@cache
def counts(method, gpus):
    return count(SHAPE, method, gpus, BATCH, LENGTH, RANK)


def in_layer(method):
    """(rows, columns) of what the method trains in a layer beside the frozen model."""
    linears = SHAPE.linears()
    if method == "lora":
        pairs = [((RANK, k), (n, RANK)) for n, k in linears.values()]
        return [part for pair in pairs for part in pair]
    if method == "s2ft":
        return [(SHAPE.hidden, HEADS * SHAPE.head_dim), (SHAPE.hidden, CHANNELS)]
    return []


def by_hand(method, gpus):
    """What rank 0 holds and exchanges: each matrix is cut along its rows, which fill up with zeros
    to a multiple of the ranks.
    """

    def shard(matrices):
        return sum(-(-rows // gpus) * columns for rows, columns in matrices)

    embedding, norm = [(SHAPE.vocab, SHAPE.hidden)], [(SHAPE.hidden, 1)]
    layer, added = [*SHAPE.linears().values(), *norm, *norm], in_layer(method)
    groups = [layer] * SHAPE.layers + [embedding, embedding, norm]
    base, adapter = shard(sum(groups, [])), SHAPE.layers * shard(added)
    full = method == "full"
    trained = base if full else adapter
    tensors = SHAPE.layers * (9 if full else len(added)) + (3 if full else 0)
    twice = SHAPE.layers * shard(layer + added) + 2 * shard(embedding)
    return {
        "weights": 4 * base if full else 2 * base + 4 * adapter,
        "gradients": 4 * trained,
        "optimizer": 2 * 4 * trained + 4 * tensors,
        "gathers": 2 * (SHAPE.layers + 2) + 1,
        "gathered": 2 * gpus * (2 * twice + shard(norm)),
        "scatters": SHAPE.layers + 3 if full else SHAPE.layers,
        "scattered": 4 * gpus * trained,
    }


def real_model(method):
    """As every rank has it when its layers are gathered."""
    model = SHAPE.build(LENGTH, torch.bfloat16, "cpu").requires_grad_(method == "full")
    if method == "lora":
        config = LoraConfig("CAUSAL_LM", r=RANK, target_modules=list(SHAPE.linears()))
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    elif method == "s2ft":
        model = get_peft_model(model, S2FTConfig(task_type="CAUSAL_LM", mode="additive"))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("gpus", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", LABORATORY)
def test_a_rank_holds_and_exchanges_what_hand_counting_gives(method, gpus):
    found = counts(method, gpus)
    expected = by_hand(method, gpus)
    for step in (found.plain, found.checkpointed):
        numbers = asdict(found) | asdict(step)
        assert {name: numbers[name] for name in expected} == expected
        held = found.weights + found.gradients + found.optimizer
        assert step.peak > held - found.gradients + step.activations
    added = SHAPE.layers * sum(rows * columns for rows, columns in in_layer(method))
    assert found.parameters == SHAPE.parameters() + added
    assert found.trained == (added or SHAPE.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", LABORATORY)
def test_activations_are_what_a_real_forward_keeps(method):
    model = real_model(method)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    found = counts(method, 2)

    def forward():
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def kept():
        forward().backward()  # what a first step makes for good
        model.zero_grad()
        real = memory.kept_by(forward, model)
        # The tokens, which the backward of a trained embedding needs, are no activations; the loss
        # is one.
        ids = 8 * tokens.numel() if method == "full" else 0
        return real.saved + real.unseen - ids + 4

    assert found.plain.activations == kept()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert found.checkpointed.activations == kept()


@pytest.mark.slow
def test_few_layers_continue_to_all():
    deep = replace(SHAPE, layers=5, of_layers=5)
    line, whole = (
        asdict(count(deep, "s2ft", 2, BATCH, LENGTH, whole=whole)) for whole in (False, True)
    )
    for each in (line, whole):
        for step in ("plain", "checkpointed"):
            del each[step]["peak"]
    assert line == whole


@pytest.mark.slow
@pytest.mark.parametrize("method", LABORATORY)
def test_times_are_those_of_the_same_model(method):
    found = counts(method, 4)
    name, sizes = LABORATORY[method], defaults(SHAPE, RANK)
    alone = METHODS[name](SHAPE.build(LENGTH, torch.bfloat16, "cpu"), sizes, 1e-3)
    assert alone.trained_parameters() == found.trained
    slow = Cluster(Ceilings("slow", {"bfloat16": 1e9, "float32": 1e9}, 1e30), 1e6, 1e6)
    times = seconds(SHAPE, method, 4, BATCH, LENGTH, RANK, found, slow)
    step = predict(Case((), SHAPE, BATCH, LENGTH, "bfloat16", name, alone.options), sizes)
    assert times["plain"].computing == pytest.approx(step.flops / 1e9)
    assert times["checkpointed"].computing > times["plain"].computing
    moved = found.plain.gathered + found.plain.scattered
    assert times["plain"].exchanging == pytest.approx(moved * 3 / 4 / 1e6)


@pytest.mark.slow
def test_the_optimizer_has_a_shard():
    wide = Cluster(Ceilings("wide", {"bfloat16": 1e30, "float32": 1e30}, 1e9), 1e30, 1e30)
    found = counts("full", 2)
    ranks = {
        gpus: seconds(SHAPE, "full", gpus, BATCH, LENGTH, 1, found, wide)["plain"].computing
        for gpus in (2, 4)
    }
    assert ranks[2] - ranks[4] == pytest.approx(7 * 4 * found.trained / 4 / 1e9)


def test_the_slower_link_decides():
    cluster = CLUSTERS["H200"]
    assert cluster.exchanging(10**12, 8) == pytest.approx(1e12 * 7 / 8 / 450e9)
    # Each of two nodes receives half of it, by eight adapters.
    assert cluster.exchanging(10**12, 16) == pytest.approx(1e12 * 15 / 16 / 450e9)
    assert cluster.exchanging(10**12, 64) == pytest.approx(1e12 * 7 / 8 / (8 * 50e9))
    assert cluster.exchanging(10**12, 2) == pytest.approx(1e12 / 2 / 450e9)


@pytest.mark.slow
def test_the_command_prints_and_writes_every_plan(capsys, tmp_path):
    size = ["--model", "toy", "--gpus", "2", "--tokens", "16", "--layers", "1"]
    methods = ["--method", "lora", "s2ft", "--rank", "4", "8"]
    assert main([*size, *methods, "--json", "--results", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "predicted" / "plan.json").read_text())["benchmarks"]
    printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert printed == written
    names = [f"toy on 2: {method}" for method in ("lora r4", "lora r8", "s2ft")]
    assert [entry["name"] for entry in written] == names


@pytest.mark.parametrize(
    ("method", "gpus", "message"),
    [("dora", 2, "method must be one of .*'dora'"), ("s2ft", 1, "gpus must be at least 2.*got 1")],
)
def test_what_cannot_be_planned_is_refused(method, gpus, message):
    with pytest.raises(ValueError, match=message):
        count(SHAPE, method, gpus, BATCH, LENGTH)
