"""The adapter apart from a model: files that are never half written, sums without rounding."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import without_digests
from tiny_models import tiny_model

import s2kernels.files
from s2kernels.adapter import (
    CONFIG_NAME,
    TENSORS_NAME,
    Slice,
    check_fingerprint,
    combine,
    fingerprint,
    pack,
    read_adapter,
    read_files,
    split_tensors,
    write_adapter,
    write_files,
)
from s2kernels.files import replacing
from s2kernels.peft import S2FTConfig

KEY = "base_model.model.layers.0.o_proj.s2ft_"
SIZE = 12  # channels on the axis, in these tests; the other side of a weight is 5 wide


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_slice(dim, index, dtype=torch.float32, seed=0, prints=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (5, len(index)) if dim == "in" else (len(index), 5)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Slice(dim, i32(*index), delta, prints)


def adapter(seed=0, dtype=torch.float32):
    """Three modules; index not in order, as an adapter may have it."""
    return {
        "layers.0.o_proj": random_slice("in", (7, 2, 9), dtype, seed),
        "layers.0.v_proj": random_slice("out", (3,), dtype, seed + 1),
        "layers.1.o_proj": random_slice("in", (0, 11), dtype, seed + 2),
    }


def dense(part):
    """The change of the whole weight, in fp64."""
    weight = torch.zeros((5, SIZE) if part.dim == "in" else (SIZE, 5), dtype=torch.float64)
    where = (slice(None), part.index.long()) if part.dim == "in" else (part.index.long(),)
    weight[where] = part.delta.double()
    return weight


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, part in left.items():
        other = right[name]
        assert part.dim == other.dim
        for got, want in ((part.index, other.index), (part.delta, other.delta)):
            assert got.dtype == want.dtype and torch.equal(got, want), name
        assert (part.fingerprint is None) == (other.fingerprint is None)
        if part.fingerprint is not None:
            assert torch.equal(part.fingerprint, other.fingerprint)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_what_is_written_is_read_bit_for_bit(dtype, tmp_path):
    slices = adapter(dtype=dtype)
    slices["layers.1.o_proj"] = random_slice(
        "in", (0, 11), dtype, prints=torch.tensor([-(2**63), 2**63 - 1])
    )
    fields = {"task_type": "CAUSAL_LM", "exclude_modules": {"b", "a"}, "target_modules": {"wrong"}}
    write_adapter(tmp_path, slices, fields)

    assert_equal(read_adapter(tmp_path), slices)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG_NAME, TENSORS_NAME]
    saved = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert saved.pop("digests").keys() == load_file(tmp_path / TENSORS_NAME).keys()
    assert saved == {
        "peft_type": "S2FT",
        "task_type": "CAUSAL_LM",
        "exclude_modules": ["a", "b"],
        "target_modules": ["layers.0.o_proj", "layers.0.v_proj", "layers.1.o_proj"],
        "indices": {
            "layers.0.o_proj": [7, 2, 9],
            "layers.0.v_proj": [3],
            "layers.1.o_proj": [0, 11],
        },
    }


def test_what_peft_saved_is_read(tmp_path):
    model = get_peft_model(
        tiny_model("llama", torch.float32),
        S2FTConfig(heads=2, channels=3, target_modules=["up_proj"]),
    )
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.s2ft_delta["default"].normal_()
    model.save_pretrained(tmp_path)
    slices = read_adapter(tmp_path)
    assert sorted(slices) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    got = slices["model.layers.1.mlp.up_proj"]
    assert got.dim == "out" and torch.equal(got.delta, layer.s2ft_delta["default"])
    assert torch.equal(got.index, layer.s2ft_index["default"])


def test_modules_trained_whole_are_not_lost_without_a_word(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = get_peft_model(
        tiny_model("llama", torch.float32),
        S2FTConfig(heads=2, channels=3, modules_to_save=["lm_head"]),
    )
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        trained.add_(1)
    model.save_pretrained(source)
    with pytest.raises(ValueError, match="lm_head.weight trained whole") as caught:
        read_adapter(source)
    assert str(source) in str(caught.value)

    config, tensors = read_files(source)
    slices, others = split_tensors(tensors, source)
    assert list(others) == ["base_model.model.lm_head.weight"]
    halved = combine([slices], [0.5])
    with pytest.raises(ValueError, match=r"must not name modules_to_save, got \['lm_head'\]"):
        write_adapter(out, halved, config)
    assert not out.exists()
    config, packed = pack(halved, config)
    write_files(out, config, packed | others)
    loaded = PeftModel.from_pretrained(tiny_model("llama", torch.float32), out)
    head = loaded.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(head.weight, trained)


def corrupt_tensors(**changes):
    def corrupt(path):
        tensors = load_file(path / TENSORS_NAME)
        for field, value in changes.items():
            if value is None:
                del tensors[KEY + field]
            else:
                tensors[KEY + field] = value
        save_file(tensors, path / TENSORS_NAME)
        without_digests(path)

    return corrupt


def test_a_fingerprint_that_is_not_known_is_zeros_in_the_file(tmp_path):
    write_adapter(tmp_path, adapter(), {})
    saved = load_file(tmp_path / TENSORS_NAME)[KEY + "fingerprint"]
    assert torch.equal(saved, torch.zeros(3, dtype=torch.int64))
    for value in (None, torch.empty(0, dtype=torch.int64)):
        corrupt_tensors(fingerprint=value)(tmp_path)
        assert_equal(read_adapter(tmp_path), adapter())


def truncate(name, size):
    def corrupt(path):
        (path / name).write_bytes((path / name).read_bytes()[:size])

    return corrupt


DAMAGES = {
    "no delta": (corrupt_tensors(delta=None), r"layers\.0\.o_proj: s2ft_delta is missing"),
    "no index, no dim": (
        corrupt_tensors(index=None, dim=None),
        r"layers\.0\.o_proj: s2ft_index, s2ft_dim is missing",
    ),
    "repeated": (corrupt_tensors(index=i32(7, 2, 7)), "must not repeat a position, got 1"),
    "negative": (corrupt_tensors(index=i32(7, -2, 9)), "values from -2 to 9"),
    "long index": (corrupt_tensors(index=i32(1, 2, 3, 4)), r"delta must have shape \(5, 4\)"),
    "empty": (corrupt_tensors(index=i32(), delta=torch.zeros(5, 0)), "must be non-empty"),
    "index dtype": (corrupt_tensors(index=torch.tensor([7, 2, 9])), "torch.int32, got torch.int64"),
    "delta dtype": (corrupt_tensors(delta=torch.ones(5, 3, dtype=torch.int8)), "floating dtype"),
    "delta shape": (corrupt_tensors(delta=torch.zeros(15)), "must be a matrix"),
    "other dim": (corrupt_tensors(dim=i32(0)[0]), r"must have shape \(3, 3\)"),
    "no such dim": (corrupt_tensors(dim=i32(2)[0]), "s2ft_dim must be 0 or 1, got 2"),
    "fingerprint": (
        corrupt_tensors(fingerprint=torch.ones(2, dtype=torch.int64)),
        r"fingerprint must have shape \(3,\)",
    ),
    "cut tensors": (truncate(TENSORS_NAME, -1), "adapter_model.safetensors is damaged"),
    "empty tensors": (truncate(TENSORS_NAME, 0), "adapter_model.safetensors is damaged"),
    "cut config": (truncate(CONFIG_NAME, -4), "adapter_config.json is damaged"),
    "list config": (lambda p: (p / CONFIG_NAME).write_text("[]"), "holds no JSON object"),
    "other method": (
        lambda p: (p / CONFIG_NAME).write_text('{"peft_type": "LORA"}'),
        "holds no S2FT adapter: its type is 'LORA'",
    ),
    "other tensors": (
        lambda p: save_file({"head.weight": torch.ones(1)}, p / TENSORS_NAME),
        "no tensor in it is called",
    ),
    "no tensors": (lambda p: (p / TENSORS_NAME).unlink(), "there is no adapter_model.safetensors"),
    "no config": (lambda p: (p / CONFIG_NAME).unlink(), "there is no adapter_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused(damage, tmp_path):
    corrupt, message = DAMAGES[damage]
    write_adapter(tmp_path, adapter(), {})
    without_digests(tmp_path)
    corrupt(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    write_adapter(tmp_path, adapter(), {})
    (tmp_path / TENSORS_NAME).unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="there is no adapter_model.safetensors"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("failing", ("config", "tensors half-way", "disk full"))
def test_an_interrupted_write_leaves_the_good_adapter(failing, tmp_path, monkeypatch):
    before = adapter(seed=0)
    write_adapter(tmp_path, before, {"revision": "old"})
    (tmp_path / "README.md").write_text("mine")

    def half_way(tensors, path, metadata):
        path.write_bytes(b"\0" * 100)
        raise KeyboardInterrupt

    def full(descriptor):
        raise OSError(28, "No space left on device")

    fields = {"revision": "new"}
    if failing == "config":
        fields["revision"] = object()
    elif failing == "tensors half-way":
        monkeypatch.setattr(s2kernels.adapter, "save_file", half_way)
    else:
        monkeypatch.setattr(s2kernels.files, "os", SimpleNamespace(fsync=full))
    with pytest.raises((KeyboardInterrupt, OSError, TypeError)):
        write_adapter(tmp_path, adapter(seed=9), fields)
    monkeypatch.undo()

    assert_equal(read_adapter(tmp_path), before)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["revision"] == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        CONFIG_NAME,
        TENSORS_NAME,
    ]
    write_adapter(tmp_path, adapter(seed=9), {"revision": "new"})
    assert_equal(read_adapter(tmp_path), adapter(seed=9))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_save_by_peft_can_be_made_whole(tmp_path):
    model = get_peft_model(tiny_model("llama", torch.float32), S2FTConfig(heads=1, channels=1))
    model.save_pretrained(tmp_path)
    want = read_adapter(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "s2ft_delta" in name:
                parameter.fill_(1)
    with pytest.raises(KeyError), replacing(tmp_path) as folder:
        model.save_pretrained(folder)
        raise KeyError
    assert_equal(read_adapter(tmp_path), want)
    with replacing(tmp_path) as folder:
        model.save_pretrained(folder)
    assert all((part.delta == 1).all() for part in read_adapter(tmp_path).values())


def test_modules_may_share_tensors_and_deltas_may_be_views(tmp_path):
    index, delta = i32(4, 1), torch.randn(4, 5, requires_grad=True)
    slices = {
        "gate_proj": Slice("out", index, delta[:2]),
        "up_proj": Slice("out", index, delta[:2]),
        "down_proj": Slice("in", index, delta.t()[:, 2:]),
    }
    write_adapter(tmp_path, slices, {})
    got = read_adapter(tmp_path)
    for name, part in slices.items():
        assert torch.equal(got[name].delta, part.delta) and torch.equal(got[name].index, index)


def test_an_adapter_without_modules_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="at least one module"):
        write_adapter(tmp_path / "new", {}, {})
    assert not (tmp_path / "new").exists()


WEIGHTS = [(1.0, 1.0), (1.0, -1.0), (0.3, 0.7), (0.0, 2.5)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_combine_is_the_sum_of_the_dense_deltas(dtype, weights):
    left, right = adapter(0, dtype), adapter(5, dtype)
    right["layers.0.o_proj"] = random_slice("in", (9, 4, 7, 1), dtype, 5)  # 7 and 9 overlap
    right["layers.2.v_proj"] = random_slice("out", (8, 6), dtype, 6)
    del right["layers.1.o_proj"]
    got = combine([left, right], weights)

    union = {"layers.0.o_proj": [1, 2, 4, 7, 9], "layers.2.v_proj": [6, 8]}
    assert got.keys() == left.keys() | right.keys()
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for name, part in got.items():
        want = sum(
            w * dense(a[name]) for w, a in zip(weights, (left, right), strict=True) if name in a
        )
        index = part.index.tolist()
        assert index == union.get(name, sorted(index))
        assert part.index.dtype == torch.int32 and part.delta.dtype == accumulated
        eps = torch.finfo(accumulated).eps
        torch.testing.assert_close(dense(part), want, rtol=2 * eps, atol=4 * eps)
        assert dense(part).ne(0).sum() == want.ne(0).sum()


def test_one_adapter_times_one_is_itself_in_order_and_minus_itself_is_zero():
    left = adapter()
    for name, part in combine([left], [1.0]).items():
        assert torch.equal(dense(part), dense(left[name]))
        assert part.index.tolist() == sorted(left[name].index.tolist())
    for part in combine([left, left], [1.5, -1.5]).values():
        assert not part.delta.any()


def test_combine_does_not_change_what_it_is_given():
    left, right = adapter(0), adapter(5)
    combine([left, right], [0.5, 2])
    assert_equal(left, adapter(0))
    assert_equal(right, adapter(5))


def test_combine_refuses_what_has_no_sum():
    name = "layers.0.o_proj"
    left = {name: random_slice("in", (1, 2))}
    with pytest.raises(ValueError, match=rf"{name}: one adapter trains input channels"):
        combine([left, {name: random_slice("out", (1, 2))}], [1, 1])
    with pytest.raises(
        ValueError, match=rf"{name}: the adapters are of different models.*\[5, 6\]"
    ):
        combine([left, {name: Slice("in", i32(1), torch.zeros(6, 1))}], [1, 1])
    with pytest.raises(ValueError, match="got 1 adapters and 2 weights"):
        combine([left], [1, 1])
    with pytest.raises(ValueError, match="got 0 adapters"):
        combine([], [])
    with pytest.raises(ValueError, match="must be finite"):
        combine([left], [float("nan")])


def base_weight(dtype=torch.bfloat16, seed=0):
    weight = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, :4] = torch.tensor([1e-6, -1e-6, 0.0, -0.0])
    return weight.to(dtype)


@pytest.mark.parametrize("dim", ("in", "out"))
def test_a_checkpoint_is_recognised_in_every_dtype_it_is_loaded_in(dim):
    for stored, loaded in {
        torch.bfloat16: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
        torch.float16: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
        torch.float32: (torch.bfloat16, torch.float32, torch.float64),
    }.items():
        weight = base_weight(stored)
        prints = fingerprint(weight, dim)
        assert prints.dtype == torch.int64 and prints.shape == (SIZE if dim == "in" else 5,)
        assert prints.unique().numel() == prints.numel()
        for dtype in loaded:
            assert torch.equal(fingerprint(weight.to(dtype), dim), prints), (stored, dtype)


# the upper 48 bits of b2sum -l 64 of the bytes 803f0040 and 404080c0, as little-endian integers
EARLIER = [-2148885605209827065, 2478679932599080675]
GOLDEN = [number >> 16 for number in EARLIER]


def test_the_fingerprint_is_the_same_on_every_machine_and_follows_its_channel():
    weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert fingerprint(weight, "out").tolist() == GOLDEN
    assert fingerprint(weight.t(), "in").tolist() == GOLDEN  # neither strides nor dim matter
    assert fingerprint(weight.flip(0), "out").tolist() == GOLDEN[::-1]
    check_fingerprint("o_proj", torch.tensor(EARLIER), weight, "out")  # all 64 bits of them
    with pytest.raises(ValueError, match="2 of 2 trained channels"):
        check_fingerprint("o_proj", torch.tensor(EARLIER[::-1]), weight, "out")


def test_the_average_of_a_fingerprint_is_still_it():
    weight = base_weight()
    prints = fingerprint(weight, "in")
    averages = [
        (3 * prints + 5 * prints) // 8,
        (sum(1000 * prints for _ in range(8)) / 8000).to(torch.int64),
        (0.3 * prints.float() + 0.7 * prints.float()).to(torch.int64),
        torch.stack([prints.float()] * 7).mean(0).to(torch.int64),
    ]
    for average in averages:
        check_fingerprint("o_proj", average, weight, "in")
    with pytest.raises(ValueError, match=f"base: {SIZE} of {SIZE}"):
        check_fingerprint("o_proj", (prints + prints.roll(1)) // 2, weight, "in")


def test_another_base_is_refused_by_name():
    weight = base_weight()
    expected = fingerprint(weight, "in")
    check_fingerprint("o_proj", expected, weight, "in")
    other = weight.clone()
    other[2, 3] *= 1.01  # one step of bf16, in one entry
    with pytest.raises(ValueError, match=f"o_proj: .* 1 of {SIZE} trained channels"):
        check_fingerprint("o_proj", expected, other, "in")
    with pytest.raises(ValueError, match=f"base: {SIZE} of {SIZE}"):
        check_fingerprint("o_proj", expected, weight.roll(1, dims=1), "in")  # permuted
    with pytest.raises(ValueError, match=r"o_proj: fingerprint must have shape \(5,\)"):
        check_fingerprint("o_proj", expected, weight, "out")
    with pytest.raises(TypeError, match="base_slice must be of a floating dtype"):
        fingerprint(weight.to(torch.int8), "in")
    with pytest.raises(ValueError, match="holds values"):
        fingerprint(weight.to("meta"), "in")


def test_an_fp32_checkpoint_in_fp16_is_refused_with_a_way_out():
    weight = base_weight(torch.float32)
    expected = fingerprint(weight, "in")
    with pytest.raises(ValueError, match=r"another base.* fp32 checkpoint loaded in fp16.*\.half"):
        check_fingerprint("o_proj", expected, weight.half(), "in")
    with pytest.raises(ValueError, match="load the base that it was trained on$"):
        check_fingerprint("o_proj", expected, weight + 1, "in")


def test_fingerprints_come_through_combine():
    weight = base_weight()
    parts = []
    for index in ((7, 2, 9), (9, 4)):
        prints = fingerprint(weight[:, list(index)], "in")
        parts.append({"o_proj": random_slice("in", index, prints=prints)})
    got = combine(parts, [1, 1])["o_proj"]
    check_fingerprint("o_proj", got.fingerprint, weight[:, [2, 4, 7, 9]], "in")

    unknown = {"o_proj": random_slice("in", (9, 1))}  # 9 is known from the others
    for order in ([unknown, *parts], [*parts, unknown]):
        got = combine(order, [1, 1, 1])["o_proj"].fingerprint
        assert got.ne(0).tolist() == [False, True, True, True, True]
        check_fingerprint("o_proj", got, weight[:, [1, 2, 4, 7, 9]], "in")
        with pytest.raises(ValueError, match="4 of 5 trained channels"):
            check_fingerprint("o_proj", got, weight[:, [1, 2, 4, 7, 9]] + 1, "in")
    assert combine([unknown], [2])["o_proj"].fingerprint is None
    prints = fingerprint(base_weight(seed=1)[:, [9]], "in")
    other = {"o_proj": random_slice("in", (9,), prints=prints)}
    with pytest.raises(ValueError, match="o_proj: the adapters were trained on different bases"):
        combine([parts[0], other], [1, 1])


def experts_slice(dim, rows, seed=0):
    """A slice of experts with weights (3, 5, 7), of the channels in `rows`."""
    index = torch.tensor(rows, dtype=torch.int32)
    shape = (3, 5, index.shape[1]) if dim == "in" else (3, index.shape[1], 7)
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=generator)
    return Slice(dim, index, delta, fingerprint(delta, dim))


def dense_of(part):
    """The whole weights (3, 5, 7) that a slice of experts adds."""
    weight = torch.zeros(3, 5, 7)
    for expert in range(3):
        one = part.of_expert(expert)
        view = weight[expert].t() if part.dim == "in" else weight[expert]
        view[one.index.long()] += one.delta.t() if part.dim == "in" else one.delta
    return weight


@pytest.mark.parametrize("dim", ("in", "out"))
def test_slices_of_experts(dim, tmp_path):
    """Saved, read, and added, where the unions of the experts' channels differ in size, too."""
    one = experts_slice(dim, [[3, 1], [0, 4], [2, 3]])
    other = experts_slice(dim, [[1, 3], [0, 2], [0, 4]], seed=1)
    write_adapter(tmp_path, {"experts.down_proj": one}, {"task_type": None})
    (read,) = read_adapter(tmp_path).values()
    for field in ("index", "delta", "fingerprint"):
        assert torch.equal(getattr(read, field), getattr(one, field))
    assert read.fingerprint.shape == (3, 2)
    for expert in range(3):
        alone = fingerprint(one.delta[expert], dim)
        assert torch.equal(one.fingerprint[expert], alone)

    unknown = [Slice(part.dim, part.index, part.delta) for part in (one, other)]
    (both,) = combine([{"e": part} for part in unknown], [2.0, -0.5]).values()
    assert both.index[0].tolist() == [0, 1, 2, 3]  # two of its own, filled up to four
    assert both.index[1].tolist() == [0, 1, 2, 4] and both.index[2].tolist() == [0, 2, 3, 4]
    want = 2 * dense_of(one) - 0.5 * dense_of(other)
    torch.testing.assert_close(dense_of(both), want, rtol=0, atol=1e-6)
    (half,) = combine([{"e": one}], [0.5]).values()
    torch.testing.assert_close(dense_of(half), 0.5 * dense_of(one), rtol=0, atol=0)
    assert set(half.fingerprint.flatten().tolist()) == set(one.fingerprint.flatten().tolist())
    with pytest.raises(ValueError, match="different bases"):
        combine([{"e": one}, {"e": other}], [1.0, 1.0])
    fewer = Slice(dim, one.index[:2], one.delta[:2])
    with pytest.raises(ValueError, match="in the number of experts"):
        combine([{"e": one}, {"e": fewer}], [1.0, 1.0])
    check_fingerprint("e", one.fingerprint, one.delta, dim)
    with pytest.raises(ValueError, match="different|another base: 2 of 6"):
        changed = one.delta.clone()
        changed[1] += 1
        check_fingerprint("e", one.fingerprint, changed, dim)
    for bad, message in (
        (dict(index=one.index[:, :1]), "delta must have shape"),
        (dict(index=one.index[0]), "delta must have shape"),
        (dict(index=one.index * 0), "repeat"),
        (dict(fingerprint=one.fingerprint[0]), "fingerprint must have shape"),
    ):
        fields = dict(dim=dim, index=one.index, delta=one.delta, fingerprint=None)
        with pytest.raises(ValueError, match=message):
            Slice(**fields | bad)
