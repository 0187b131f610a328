"""Adapters by name: what is taken in, what is on the device, and what may leave it."""

import random
import shutil
import statistics
import threading
import time

import pytest
import torch
from served_models import llama, random_slices

from s2kernels.adapter import Slice, write_adapter
from s2kernels.serve.content import content_key
from s2kernels.serve.pool import RowPool
from s2kernels.serve.store import AdapterStore, NoRoom
from s2kernels.serve.switch import Switcher

NAME = "model.layers.0.mlp.down_proj"
WIDTH = 32


@pytest.fixture
def model():
    return llama()


def store(model, num_rows=100, dtype=torch.float32):
    pool = RowPool(WIDTH, num_rows, dtype, "cpu")
    pool.rows.fill_(float("nan"))
    return AdapterStore(Switcher(model), pool)


def of_size(num, seed=0, dtype=torch.float32):
    """One module, `num` channels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(72, generator=generator)[:num].int()
    return {NAME: Slice("in", index, torch.randn(WIDTH, num, generator=generator).to(dtype))}


def rows_on_device(adapters, adapter):
    return adapters.pool.rows[adapter.resident.rows.long()]


def total(slices):
    return sum(len(part.index) for part in slices.values())


def test_rows_and_channels_are_those_of_the_slices(model, tmp_path):
    slices = random_slices(model, 1)
    write_adapter(tmp_path / "a", slices, {})
    adapters = store(model, 200)
    told = []
    adapters._attach = told.append
    adapters.register("a", tmp_path / "a")
    adapters.register("b", random_slices(model, 2))
    assert told == [adapters.places, {}]
    assert set(adapters.places) == {(name, part.dim) for name, part in slices.items()}
    (adapter,) = adapters.acquire(["a"])
    rows, places = rows_on_device(adapters, adapter), adapters.places
    for name, part in slices.items():
        first, last = adapter.bounds[places[name, part.dim]].tolist()
        assert torch.equal(adapter.resident.channels[first:last], part.index)
        delta = part.delta.t() if part.dim == "in" else part.delta
        assert torch.equal(rows[first:last], delta)
    for name, part in adapters.slices("a").items():
        assert torch.equal(part.delta, slices[name].delta)
        assert torch.equal(part.index, slices[name].index)


def test_equal_content_is_there_once(model):
    adapters = store(model)
    adapters.register("a", of_size(40))
    adapters.register("b", of_size(40))
    first, second = adapters.acquire(["a", "b"])
    assert first is second and first.in_flight == 2
    assert adapters.pool.num_free == 60
    adapters.unregister("a")
    adapters.release([first, second])
    assert adapters.names() == ["b"] and adapters.resident() == ["b"]
    adapters.unregister("b")
    assert adapters.pool.num_free == 100 and adapters.resident() == []


def test_the_least_recently_used_leaves(model):
    adapters = store(model)
    for number in range(5):
        adapters.register(f"a{number}", of_size(25, number))
    for name in ("a0", "a1", "a2", "a3", "a0"):
        adapters.release(adapters.acquire([name]))
    adapters.release(adapters.acquire(["a4"]))
    assert adapters.resident() == ["a2", "a3", "a0", "a4"]


def test_what_is_in_flight_or_pinned_never_leaves(model):
    adapters = store(model)
    for number in range(8):
        adapters.register(f"a{number}", of_size(25, number))
    adapters.pin("a0")
    held = adapters.acquire(["a1", "a2"])
    before = [rows_on_device(adapters, adapter).clone() for adapter in held]
    for number in (3, 4, 5, 6, 7, 3):
        adapters.release(adapters.acquire([f"a{number}"]))
        assert {"a0", "a1", "a2"} < set(adapters.resident())
    with pytest.raises(NoRoom, match="25 more rows"):
        adapters.acquire(["a3", "a4"])
    assert not adapters.prefetch("a5") or "a5" in adapters.resident()
    more = adapters.acquire(["a6"])
    assert not adapters.prefetch("a7")
    with pytest.raises(NoRoom):
        adapters.pin("a7")
    for adapter, rows in zip(held, before, strict=True):
        assert torch.equal(rows_on_device(adapters, adapter), rows)
    adapters.release([*held, *more])
    adapters.unpin("a0")
    adapters.release(adapters.acquire(["a3", "a4", "a5", "a7"]))
    assert adapters.resident() == ["a3", "a4", "a5", "a7"]


def test_what_cannot_be_acquired_leaves_no_count(model):
    adapters = store(model, 50)
    adapters.register("a", of_size(30, 1))
    adapters.register("b", of_size(30, 2))
    with pytest.raises(NoRoom):
        adapters.acquire(["a", None, "b"])
    with pytest.raises(ValueError, match="no adapter is called 'c'"):
        adapters.acquire(["a", "c"])
    assert not adapters.is_in_flight()
    adapters.release(adapters.acquire(["b"]))
    assert adapters.resident() == ["b"]


def test_an_adapter_in_flight_outlives_its_name(model):
    adapters = store(model)
    adapters.register("a", of_size(40, 1))
    (held,) = adapters.acquire(["a"])
    rows = rows_on_device(adapters, held).clone()
    adapters.unregister("a")
    adapters.register("a", of_size(60, 2))
    (other,) = adapters.acquire(["a"])
    assert other is not held and other.key != held.key
    assert torch.equal(rows_on_device(adapters, held), rows)
    assert adapters.pool.num_free == 0
    adapters.release([held])
    assert adapters.pool.num_free == 40


def test_a_copy_that_fails_leaves_the_pool_as_it_was(model, monkeypatch):
    adapters = store(model, 60)
    adapters.register("a", of_size(30, 1))
    adapters.register("b", of_size(30, 2))

    def failing(runs, values):
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(adapters.pool, "write", failing)
        with pytest.raises(MemoryError):
            adapters.acquire(["a"])
    assert adapters.pool.num_free == 60 and not adapters.is_in_flight()
    adapters.release(adapters.acquire(["a", "b"]))
    assert adapters.resident() == ["a", "b"]


def test_slices_are_exact_where_the_pool_rounds(model, tmp_path):
    slices = random_slices(model, 1)
    write_adapter(tmp_path / "a", slices, {})
    adapters = store(model, dtype=torch.bfloat16)
    adapters.register("path", tmp_path / "a")
    other = of_size(9, 3)
    adapters.register("slices", other)
    for name, want in (("path", slices), ("slices", other)):
        got = adapters.slices(name)
        assert all(torch.equal(got[n].delta, want[n].delta) for n in want)
    shutil.rmtree(tmp_path / "a")
    write_adapter(tmp_path / "a", of_size(5), {})
    with pytest.raises(ValueError, match="another adapter than when 'path' was registered"):
        adapters.slices("path")


def test_the_hash_tells_contents_apart():
    part = of_size(4)[NAME]
    others = [
        {NAME: part},
        {"model.layers.1.mlp.down_proj": part},
        {NAME: Slice("in", part.index.flip(0), part.delta)},
        {NAME: Slice("in", part.index, part.delta + 1e-6)},
        {NAME: Slice("in", part.index, part.delta.half())},
        {NAME: Slice("out", part.index, part.delta.t())},
    ]
    assert len({content_key(slices) for slices in others}) == len(others)
    assert content_key({NAME: part}) == content_key(dict(others[0]))


def test_what_does_not_fit_is_refused(model, tmp_path):
    adapters = store(model, 50)
    adapters.register("taken", of_size(3))
    part = of_size(4)[NAME]
    other_base = random_slices(llama(seed=9), 1)
    experts = Slice("in", part.index.expand(2, -1).contiguous(), part.delta.expand(2, -1, -1))
    wide = Slice("in", torch.tensor([1], dtype=torch.int32), torch.randn(72, 1))
    cases = [
        ("taken", of_size(5), "name 'taken' is taken"),
        ("", of_size(5), "name must be a non-empty string"),
        ("a", {}, "at least one module"),
        ("a", of_size(51), "trains 51 channels, more than the 50 rows"),
        ("a", {"nowhere": part}, "nowhere: the model has no such layer"),
        ("a", {"model.norm": part}, "model.norm is no linear layer"),
        ("a", {NAME: experts}, "adapters of experts cannot be served"),
        ("a", {NAME: Slice("in", part.index, part.delta[1:])}, "must fit a weight of shape"),
        ("a", {NAME: Slice("in", part.index + 72, part.delta)}, r"index must lie in \[0, 72\)"),
        ("a", {"model.layers.0.mlp.up_proj": wide}, "are 72 wide, and the pool is for 32"),
        ("a", other_base, "was trained on another base"),
        ("a", tmp_path / "nothing", "holds no adapter"),
    ]
    for name, source, message in cases:
        with pytest.raises(ValueError, match=message):
            adapters.register(name, source)
    assert adapters.names() == ["taken"] and list(adapters.places) == [(NAME, "in")]
    for call in (adapters.unregister, adapters.pin, adapters.unpin, adapters.prefetch):
        with pytest.raises(ValueError, match="no adapter is called 'b'"):
            call("b")


def test_fingerprints_are_of_the_base_even_while_an_adapter_is_written_in(model):
    adapters = store(model, 200)
    slices, other = random_slices(model, 1, most=20), random_slices(model, 2, most=20)
    adapters._base.switch("a", slices)
    adapters.register("b", other)
    assert adapters.names() == ["b"]


def test_the_thousandth_costs_what_the_tenth_cost(model):
    adapters = store(model, 2000)
    contents = [of_size(8, seed) for seed in range(1200)]
    seconds = []
    for number, slices in enumerate(contents):
        began = time.perf_counter()
        adapters.register(f"a{number}", slices)
        adapters.release(adapters.acquire([f"a{number}"]))
        seconds.append(time.perf_counter() - began)
    first, last = statistics.median(seconds[5:205]), statistics.median(seconds[-200:])
    assert last < 1.5 * first
    assert len(adapters.resident()) == 250


def test_threads_never_see_rows_of_another_adapter(model):
    adapters = store(model, 90)
    contents = {f"a{number}": of_size(20 + number, number) for number in range(8)}
    for name, slices in contents.items():
        adapters.register(name, slices)
    wrong, refused = [], []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(200):
            names = draw.sample(list(contents), draw.randrange(1, 3))
            try:
                held = adapters.acquire(names)
            except NoRoom:
                refused.append(names)
                continue
            for name, adapter in zip(names, held, strict=True):
                if not torch.equal(
                    rows_on_device(adapters, adapter), contents[name][NAME].delta.t()
                ):
                    wrong.append(name)
            adapters.release(held)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not adapters.is_in_flight() and len(refused) < 800
