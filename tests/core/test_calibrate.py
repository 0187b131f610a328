"""Scores against their definitions, by dense autograd, and a model that is only borrowed."""

import copy
import functools
import random
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from tiny_models import MODEL_TYPES, tiny_model, token_ids
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding

from bench.measure.memory import gradients, storages, total_bytes
from s2kernels.coupling import Structure, parameter, structures
from s2kernels.peft import S2FTConfig
from s2kernels.select import STRATEGIES, scores

CALIBRATED = STRATEGIES[1:]


@functools.cache
def shared_model(model_type: str) -> nn.Module:
    """Of tests that leave it as it is, as all of this module should."""
    return tiny_model(model_type)


def samples(lengths=(9, 5, 7, 2), seed: int = 1) -> list[dict]:
    """Sequences of their own, (1, length) each."""
    ids = token_ids(len(lengths), max(lengths), seed)
    return [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)]


def padded(sequences: list[dict], side: str = "right", extra: int = 0) -> dict:
    """One batch of them, with a mask. What the padding holds must not matter: it is random."""
    length = max(item["input_ids"].shape[1] for item in sequences) + extra
    ids = token_ids(len(sequences), length, seed=99)
    mask = torch.zeros(ids.shape, dtype=torch.int64)
    for row, item in enumerate(sequences):
        n = item["input_ids"].shape[1]
        where = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, where], mask[row, where] = item["input_ids"][0], 1
    # rotary tables are fp32: at other positions the same distances are other numbers
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def units_of(structure: Structure, dense: dict[str, torch.Tensor]) -> torch.Tensor:
    """Squared norms of each unit's share of `dense`, tensors like the coupled weights."""
    squares = torch.zeros(structure.count(structure.unit), dtype=torch.float64)
    group = structure.num_heads // max(structure.num_kv_heads, 1)
    for member in structure.members:
        if member.suffix not in dense:
            continue
        value = dense[member.suffix]
        if structure.kind == "experts":
            for unit in range(len(squares)):
                expert, channel = divmod(unit, structure.num_channels)
                for segment in range(len(member.units)):
                    at = channel + segment * structure.num_channels
                    squares[unit] += value[expert].select(member.axis - 1, at).square().sum()
            continue
        rows = value if member.axis == 0 else value.t()
        start = 0
        for kind in member.units:
            width = structure.width(kind) * member.blocks
            for unit in range(len(squares)):
                first = start + (unit // group if kind == "kv_head" else unit) * width
                squares[unit] += rows[first : first + width].square().sum()
            start += structure.count(kind) * width
    return squares


def weights_of(model, structure) -> dict[str, torch.Tensor]:
    return {
        member.suffix: parameter(model, structure, member)
        for member in structure.members
        if not member.suffix.endswith("bias")
    }


def with_labels(item: dict) -> dict:
    """Those that a causal model is given where the batch has none; other models need them."""
    return {**item, "labels": item["input_ids"].clone()}


def by_definition(model, strategy: str, sequences: list[dict]) -> dict[str, torch.Tensor]:
    """The formulas of `scores`, sequence by sequence, with every dense gradient there is."""
    model = copy.deepcopy(model).requires_grad_()
    found = structures(model)
    if strategy == "weight":
        return {
            name: units_of(s, {k: w.detach() for k, w in weights_of(model, s).items()}).sqrt()
            for name, s in found.items()
        }
    if strategy == "product":
        weight, activation = (
            by_definition(model, part, sequences) for part in ("weight", "activation")
        )
        return {name: weight[name] * activation[name] for name in activation}
    if strategy == "gradient":
        total = {name: torch.zeros(s.count(s.unit)).double() for name, s in found.items()}
        for item in sequences:
            model.zero_grad()
            model(**with_labels(item)).loss.backward()
            for name, s in found.items():
                total[name] += units_of(s, {k: w.grad for k, w in weights_of(model, s).items()})
        return {name: (value / len(sequences)).sqrt() for name, value in total.items()}

    inputs: dict[str, list] = {}
    projections = {}
    for name, s in found.items():
        if s.kind == "experts":
            layer = model.get_submodule(name)
            projections[name] = layer, s
            layer.register_forward_pre_hook(
                lambda module, args, name=name: inputs.setdefault(name, []).append(
                    inputs_of_experts(module, *args)
                )
            )
        else:
            (suffix,) = (m.suffix for m in s.members if m.dim == "in")
            layer = model.get_submodule(f"{name}.{suffix.removesuffix('.weight')}")
            projections[name] = layer, s
            layer.register_forward_hook(
                lambda module, args, y, name=name: inputs.setdefault(name, []).append(args[0])
            )
    with torch.no_grad():
        for item in sequences:
            model(**item)
    answer = {}
    for name, (_, s) in projections.items():
        x = torch.cat([part.flatten(0, -2) for part in inputs[name]])
        heads = x.view(len(x), s.count(s.unit), s.width(s.unit))
        answer[name] = heads.norm(dim=2).square().mean(0).sqrt()
    return answer


def inputs_of_experts(module, x, experts, weights) -> torch.Tensor:
    """What down_proj of every expert sees of each token, zero where it does not see it."""
    gate, up = torch.einsum("td,efd->tef", x, module.gate_up_proj).chunk(2, dim=-1)
    goes = torch.zeros(gate.shape[:2], dtype=x.dtype).scatter_(1, experts, 1.0)
    return (nn.functional.silu(gate) * up * goes.unsqueeze(-1)).flatten(1)


def assert_same(got, expected, rtol=1e-10):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].device.type) == (torch.float64, "cpu")
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=0)
        assert value.max() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_are_what_they_are_defined_as(model_type, strategy):
    model = shared_model(model_type)
    sequences = samples((9, 5, 7))
    expected = by_definition(model, strategy, sequences)
    batches = [with_labels(item) for item in sequences] if strategy == "gradient" else sequences
    got = scores(model, strategy, batches, progress=False)
    # the gradient's squares come as differences of larger numbers: half the digits for the smallest
    assert_same(got, expected, rtol=1e-8 if strategy == "gradient" else 1e-10)


@pytest.mark.parametrize("strategy", CALIBRATED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_do_not_matter(strategy, side):
    model, sequences = shared_model("llama"), samples()
    # transformers computes the loss in fp32, padding or not
    rtol = 1e-5 if strategy == "gradient" else 1e-10
    expected = scores(model, strategy, sequences, progress=False)
    for sizes in ([4], [1, 3], [2, 2], [3, 1]):
        parts = torch.arange(4).split(sizes)
        batches = [padded([sequences[i] for i in part], side, extra=2) for part in parts]
        assert_same(scores(model, strategy, batches, progress=False), expected, rtol)
    # what is not marked as padding counts
    unmarked = [{"input_ids": batch["input_ids"]} for batch in batches]
    got = scores(model, strategy, unmarked, progress=False)
    assert not torch.allclose(got["model.layers.0.mlp"], expected["model.layers.0.mlp"], rtol=1e-3)


@pytest.mark.parametrize("strategy", ("activation", "product"))
def test_padding_goes_to_no_expert(strategy):
    model, sequences = tiny_model("mixtral"), samples()
    expected = scores(model, strategy, sequences, progress=False)
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert not any(forwards)  # they were lent
    batches = [padded(sequences[:3], "left", extra=2), padded(sequences[3:], "right", extra=1)]
    assert_same(scores(model, strategy, batches, progress=False), expected)


def test_activations_of_experts_are_seen_without_an_adapter_alone():
    model = get_peft_model(tiny_model("mixtral"), S2FTConfig(heads=2, channels=3))
    with pytest.raises(ValueError, match="mlp.experts has an adapter, through which .*: select"):
        scores(model, "activation", samples(), progress=False)


@pytest.mark.parametrize("strategy", CALIBRATED)
def test_splits_of_a_batch_do_not_matter(strategy):
    model, ids = shared_model("qwen2"), token_ids(4, 6)
    expected = scores(model, strategy, [ids], progress=False)
    again = scores(model, strategy, ({"input_ids": ids} for _ in range(1)), progress=False)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    for split in (ids.split(1), ids.split(3)):
        assert_same(scores(model, strategy, split, progress=False), expected, rtol=1e-10)


def test_labels_of_the_batch_decide():
    model, (item, *_) = shared_model("llama"), samples()
    implied = scores(model, "gradient", [item], progress=False)
    assert_same(scores(model, "gradient", [with_labels(item)], progress=False), implied, rtol=0)
    masked = with_labels(item)
    masked["labels"][:, :6] = -100
    got = scores(model, "gradient", [masked], progress=False)
    reference = copy.deepcopy(model).requires_grad_()
    logits = reference(item["input_ids"]).logits[0, 5:-1]  # of tokens 6, 7, 8
    nn.functional.cross_entropy(logits, item["input_ids"][0, 6:]).backward()
    structure = structures(reference)["model.layers.0.mlp"]
    dense = {k: w.grad for k, w in weights_of(reference, structure).items()}
    torch.testing.assert_close(
        got["model.layers.0.mlp"], units_of(structure, dense).sqrt(), rtol=1e-5, atol=0
    )


def test_low_precision():
    """Errors of the size that the dtype makes, not of its square root."""
    for dtype, rtol in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        model = tiny_model("llama", dtype)
        exact = tiny_model("llama")
        exact.load_state_dict(model.state_dict())
        for strategy in STRATEGIES:
            got = scores(model, strategy, samples(), progress=False)
            assert_same(got, scores(exact, strategy, samples(), progress=False), rtol)


@pytest.mark.parametrize("layout", ["permute", "gather"])
def test_scores_after_a_tuner(layout):
    """In the original basis, whatever the tuner makes of the weights: they are what they were."""
    base = shared_model("llama")
    expected = {s: scores(base, s, samples(), progress=False) for s in STRATEGIES}
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    ours = S2FTConfig(target_modules=targets, heads=2, channels=7, layout=layout, seed=5)
    for config in (ours, LoraConfig(target_modules=targets, r=2)):
        model = get_peft_model(copy.deepcopy(base), config)
        for _ in range(2):
            for strategy in STRATEGIES:
                got = scores(model, strategy, samples(), progress=False)
                assert all(name.startswith("base_model.model.") for name in got)
                got = {name.removeprefix("base_model.model."): v for name, v in got.items()}
                assert_same(got, expected[strategy], rtol=1e-8)
    # the weights' scores are the base's even where a trained slice is written into them
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(heads=3, channels=7))
    for name, value in model.named_parameters():
        if "s2ft_delta" in name:
            nn.init.normal_(value)
    model(token_ids())
    got = scores(model, "weight")
    got = {name.removeprefix("base_model.model."): v for name, v in got.items()}
    assert_same(got, expected["weight"])
    # activations and gradients are of the model as it is
    got = scores(model, "activation", samples(), progress=False)
    name = "model.layers.1.mlp"
    assert not torch.allclose(got[f"base_model.model.{name}"], expected["activation"][name])


def _state(model: nn.Module) -> dict:
    return dict(
        values={name: value.clone() for name, value in model.state_dict().items()},
        versions=[value._version for value in model.parameters()],
        grads=[
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        flags=[value.requires_grad for value in model.parameters()],
        modes=[module.training for module in model.modules()],
        hooks=[
            len(hooks)
            for module in model.modules()
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
            )
        ]
        + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        rng=(torch.get_rng_state(), random.getstate()),
    )


def _equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _draining(batches):
    """Takes from the random states as a shuffling loader does; raises where it finds None."""
    for batch in batches:
        torch.rand(3), random.random()
        if batch is None:
            raise RuntimeError("trap")
        yield batch


@pytest.mark.parametrize(
    "strategy, trap",
    [
        (strategy, trap)
        for strategy in CALIBRATED
        for trap in ("no", "iterable", "forward", "backward")
        if strategy == "gradient" or trap != "backward"
    ],
)
@pytest.mark.parametrize("model_type", [MODEL_TYPES[0], MODEL_TYPES[-1]])
def test_the_model_is_left_as_it_was(model_type, strategy, trap):
    model = tiny_model(model_type, attention_dropout=0.5)
    structure = list(structures(model).values())[0]
    leaf = next(m.suffix for m in structure.members if m.dim == "in").removesuffix(".weight")
    for number, value in enumerate(model.parameters()):
        value.requires_grad_(number % 2 == 0)
        if number % 3 == 0:
            value.grad = torch.full_like(value, 0.5)
    model.train()
    model.get_submodule(structure.name).eval()
    batches = _draining([with_labels(item) for item in samples()])
    expected = scores(copy.deepcopy(model).eval(), strategy, batches, progress=False)

    before = _state(model)
    if trap == "no":
        batches = _draining([with_labels(item) for item in samples()])
        assert_same(scores(model, strategy, batches, progress=False), expected, rtol=0)
    else:
        layer = model.get_submodule(f"{structure.name}.{leaf}")
        if trap in ("forward", "backward"):
            layer.forward = functools.partial(_trapped, layer.forward, trap)
        batches = _draining([*map(with_labels, samples()), None])
        with pytest.raises(RuntimeError, match="trap"):
            scores(model, strategy, batches, progress=False)
        vars(layer).pop("forward", None)
    assert _equal(_state(model), before)


def _trapped(forward, where, x):
    if where == "forward":
        raise RuntimeError("trap")
    return _Spring.apply(forward(x))


class _Spring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("trap")


class _Live(TorchDispatchMode):
    """How many bytes of storages that operators made are alive, at most, and of the largest one."""

    def __init__(self, at_least: int = 0):
        super().__init__()
        self.at_least = at_least  # smaller ones are not counted
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = storages(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        result = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage.nbytes() >= self.at_least:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        sizes = [size for _, size in self._alive.values()]
        self.peak = max(self.peak, sum(sizes))
        self.largest = max(self.largest, *sizes, 0)
        return result


def coupled_weights(model) -> list[nn.Parameter]:
    return [w for s in structures(model).values() for w in weights_of(model, s).values()]


def test_gradient_makes_no_gradient_of_a_weight():
    """Nothing as large as the smallest coupled weight is ever allocated, forward and backward."""
    model = tiny_model("llama", torch.float32, hidden_size=128, intermediate_size=256)
    weights, ids = coupled_weights(model), token_ids(3, 4)
    sizes = [weight.untyped_storage().nbytes() for weight in weights]
    with _Live() as live:
        scores(model, "gradient", [ids], progress=False)
    assert live.largest < min(sizes)
    assert not list(gradients(model))
    ours = live.peak

    # and the count would see them: back-propagation leaves the gradients of all weights
    model.requires_grad_()
    with _Live() as live:
        model(ids[:1], labels=ids[:1]).loss.backward()
    assert live.largest >= max(sizes)
    assert live.peak >= total_bytes(gradients(model)) >= sum(sizes) > 4 * ours


def test_gradients_of_experts_exist_for_one_layer_at_a_time():
    """The peak of a deep model is that of a shallow one."""
    peaks = []
    for depth in (2, 6):
        model = tiny_model("mixtral", torch.float32, num_hidden_layers=depth, hidden_size=64)
        experts = [weight for weight in coupled_weights(model) if weight.ndim == 3]
        assert len(experts) == 2 * depth
        smallest = min(weight.untyped_storage().nbytes() for weight in experts)
        with _Live(at_least=smallest) as live:
            scores(model, "gradient", [token_ids(2, 4)], progress=False)
        peaks.append(live.peak)
    assert smallest <= peaks[0] == peaks[1]


def _one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, sequences = tiny_model("llama"), samples()
    shares = {
        "uneven": [sequences[:3], sequences[3:]],
        "one has nothing": [sequences, []],
    }
    results = {
        (label, strategy): scores(model, strategy, share[rank], progress=False)
        for label, share in shares.items()
        for strategy in STRATEGIES
    }
    try:
        scores(model, "activation", [], progress=False)
    except ValueError as error:
        results["error"] = str(error)
    for layer in model.model.layers:
        fully_shard(layer)
    for strategy in STRATEGIES:
        part = sequences[2 * rank :][:2]
        results["sharded", strategy] = scores(model, strategy, part, progress=False)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each brings its share of the calibration set, and all get the scores of the whole."""
    mp.spawn(_one_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and len(first) == 3 * len(STRATEGIES) + 1
    assert first.pop("error") == second.pop("error")
    for (label, strategy), got in first.items():
        expected = scores(shared_model("llama"), strategy, samples(), progress=False)
        assert_same(got, expected, rtol=1e-12)
        assert _equal(second[label, strategy], got)


def test_a_loader_and_encodings_are_batches():
    model, ids = shared_model("mistral"), token_ids(4, 6)
    expected = scores(model, "activation", [ids], progress=False)
    loader = torch.utils.data.DataLoader(ids, batch_size=3, shuffle=True)
    state = torch.get_rng_state()
    assert_same(scores(model, "activation", loader, progress=False), expected)
    assert torch.equal(torch.get_rng_state(), state)
    encodings = [BatchEncoding({"input_ids": part}) for part in ids.split(2)]
    assert_same(scores(model, "activation", encodings, progress=False), expected)
    embeds = [{"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}]
    assert_same(scores(model, "activation", embeds, progress=False), expected)
    embeds[0]["labels"] = ids
    expected = scores(model, "gradient", [ids], progress=False)
    assert_same(scores(model, "gradient", embeds, progress=False), expected)


def test_under_no_grad_and_inference_mode():
    model = shared_model("qwen3")
    expected = scores(model, "gradient", samples(), progress=False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            batches = samples()
            assert_same(scores(model, "gradient", batches, progress=False), expected, rtol=0)


def test_progress(capsys, monkeypatch):
    model, batches = shared_model("llama"), samples()
    scores(model, "activation", batches)
    assert "calibration: 100%" in capsys.readouterr().err
    scores(model, "activation", batches, progress=False)
    scores(model, "weight")
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # an import of it fails
    expected = scores(model, "activation", batches, progress=False)
    assert_same(scores(model, "activation", batches), expected, rtol=0)


IDS = token_ids()


@pytest.mark.parametrize(
    "strategy, batches, error, message",
    [
        ("norm", [IDS], ValueError, "strategy must be one of 'weight', .*, got 'norm'"),
        ("activation", None, ValueError, "batches: strategy 'activation' wants .*, got None"),
        ("gradient", None, ValueError, "batches: strategy 'gradient' wants .*, got None"),
        ("product", [], ValueError, "batches: .* at least one token wanted, got an empty iter"),
        ("gradient", iter(()), ValueError, "batches: .* at least one token wanted, got an empty"),
        ("activation", IDS, TypeError, "batches: an iterable .* wanted, got one Tensor; put it"),
        ("activation", {"input_ids": IDS}, TypeError, "batches: .* got one dict; put it"),
        ("activation", [IDS, [1, 2]], TypeError, "batches: item 1 must be a mapping .* got list"),
        ("activation", [IDS[0]], ValueError, r"item 0 must hold input_ids .* got \(9,\)"),
        (
            "activation",
            [{"input_ids": [[1]]}],
            ValueError,
            "item 0 must hold input_ids .* got list",
        ),
        ("gradient", [{"labels": IDS}], ValueError, "item 0 must hold input_ids .* got NoneType"),
        (
            "activation",
            [{"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)}],
            ValueError,
            r"item 0 must have an attention_mask of shape \(2, 9\), got \(2, 1, 9, 9\)",
        ),
        (
            "gradient",
            [{"inputs_embeds": torch.zeros(1, 3, 32).double()}],
            ValueError,
            "'gradient' needs labels, or input_ids and .*; got inputs_embeds for a LlamaForCausal",
        ),
        ("gradient", [IDS[:, :1]], ValueError, "a finite loss wanted of every sequence.* got nan"),
    ],
)
def test_what_is_refused(strategy, batches, error, message):
    with pytest.raises(error, match=message):
        scores(shared_model("llama"), strategy, batches, progress=False)


def test_an_encoder_needs_labels():
    model = shared_model("bert")
    with pytest.raises(ValueError, match="needs labels, .* got input_ids for a BertFor"):
        scores(model, "gradient", [IDS], progress=False)


def test_a_layer_that_does_not_run_is_refused():
    """Its score would be zero, which is not what is known about it."""
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: nn.functional.linear(mlp.up_proj(x), mlp.down_proj.weight)
    message = "model.layers.1.mlp.{} took no part in any run of the model"
    with pytest.raises(ValueError, match=message.format("down_proj.weight")):
        scores(model, "activation", [IDS], progress=False)
    with pytest.raises(ValueError, match=message.format("gate_proj.weight")):
        scores(model, "gradient", [IDS], progress=False)


def test_weights_that_are_none_are_refused():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.to("meta")
    with pytest.raises(
        ValueError, match="floating weights, model.layers.0.mlp.up_proj.weight .* me"
    ):
        scores(model, "weight")
    packed = torch.zeros(mlp.up_proj.weight.shape, dtype=torch.int8)
    mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="floating weights, .*up_proj.weight is torch.int8 on cpu"):
        scores(model, "weight")
