"""transformers' continuous batching with an adapter for each request."""

import asyncio
import copy
import time

import pytest
import torch
from served_models import random_slices, with_slices
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import scheduler as schedulers
from transformers.generation.continuous_batching.cache_allocators import cache_allocator

from s2kernels.serve import Serving, continuous
from s2kernels.serve.scheduling import Requests

pytestmark = pytest.mark.slow

NAMES = [f"a{number}" for number in range(8)]
EVERYONE = [None, *NAMES]
GREEDY = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=10)
ROWS_OF = 32 * 4  # bytes of a row


def batching(**fields):
    default = dict(num_blocks=64, page_size=8, max_batch_tokens=48, use_async_batching=False)
    return ContinuousBatchingConfig(**default | fields)


def size(slices):
    return sum(len(part.index) for part in slices.values())


@pytest.fixture
def serve(model, adapters):
    """A function that makes a Serving with all adapters, closed in the end."""
    made = []

    def make(pool_bytes=2**22):
        served = Serving(model, pool_bytes=pool_bytes)
        served.store.pool.rows.fill_(float("nan"))
        for name, slices in adapters.items():
            served.register(name, slices)
        made.append(served)
        return served

    yield make
    for served in made:
        assert not served.store.is_in_flight()
        served.close()


@pytest.fixture(scope="module")
def alone(model, adapters):
    """(adapter, prompt) -> what the model with it in its weights generates."""
    written = {None: model} | {name: with_slices(model, s) for name, s in adapters.items()}
    known = {}

    def generate(name, prompt, num=10):
        key = name, tuple(prompt), num
        if key not in known:
            ids = torch.tensor([prompt])
            out = written[name].generate(ids, GREEDY, max_new_tokens=num)
            known[key] = out[0, len(prompt) :].tolist()
        return known[key]

    return generate


def prompt(seed, length=None):
    generator = torch.Generator().manual_seed(seed)
    if length is None:
        length = int(torch.randint(1, 40, (), generator=generator))
    return torch.randint(3, 97, (length,), generator=generator).tolist()


def wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_every_request_is_as_if_alone(serve, alone, scheduler):
    names = [EVERYONE[i % 9] for i in range(27)]
    inputs = [prompt(i) for i in range(27)]
    outputs = serve().generate_batch(
        inputs,
        adapters=names,
        generation_config=GREEDY,
        continuous_batching_config=batching(scheduler_type=scheduler),
    )
    for name, tokens, output in zip(names, inputs, outputs, strict=True):
        assert output.prompt_ids == tokens
        assert output.generated_tokens == alone(name, tokens)


def test_one_prompt_for_all_is_never_shared_across_adapters(serve, alone):
    """Prefixes are shared within an adapter, which is seen, and not between any two."""
    tokens = prompt(1, 40)
    with serve().continuous_batching(GREEDY, batching(num_blocks=300)) as manager:
        cache = manager.batch_processor.cache
        assert cache.use_prefix_sharing
        found, search = {}, cache.search_prefix_match

        def recording(request_id, prompt_ids):
            found[request_id] = search(request_id, prompt_ids)
            return found[request_id]

        cache.search_prefix_match = recording
        for turn in range(2):
            for name in EVERYONE:
                request_id = f"{turn} {name}"
                manager.add_request(tokens, request_id, adapter=name)
                (output,) = manager.results([request_id])
                assert output.generated_tokens == alone(name, tokens)
                assert found[request_id] == (32 if turn else 0)


def test_together_too(serve, alone):
    tokens = prompt(1, 33)
    names = EVERYONE * 4
    outputs = serve().generate_batch(
        [tokens] * len(names),
        adapters=names,
        generation_config=GREEDY,
        continuous_batching_config=batching(num_blocks=300),
    )
    for name, output in zip(names, outputs, strict=True):
        assert output.generated_tokens == alone(name, tokens)


def test_marks_differ_and_are_of_32_bits():
    requests = Requests(None, None, 2**17, None, None)  # type: ignore[arg-type]

    class Content:
        def __init__(self, key):
            self.key = key

    seen = set()
    for number in range(40000):
        requests.add(str(number), Content(str(number)))  # type: ignore[arg-type]
        tokens = requests.marked(str(number), [2**17 - 1, 5, 7])
        assert tokens[2:] == [7] and 0 <= max(tokens) < 2**31
        seen.add(tuple(tokens))
    requests.add("base", None)
    seen.add(tuple(requests.marked("base", [2**17 - 1, 5, 7])))
    assert len(seen) == 40001
    again = requests.marked("3", [0, 0, 7])
    assert again not in [list(tokens) for tokens in seen]
    hashes = {cache_allocator.compute_block_hash(None, list(tokens)) for tokens in seen}
    assert len(hashes) == len(seen)


def test_more_adapters_than_the_pool_holds(serve, alone, adapters):
    """They wait for room in line; what runs keeps its rows."""
    served = serve(pool_bytes=ROWS_OF * 2 * max(map(size, adapters.values())))
    names = [EVERYONE[(5 * i) % 9] for i in range(30)]
    inputs = [prompt(100 + i) for i in range(30)]
    outputs = served.generate_batch(
        inputs,
        adapters=names,
        generation_config=GREEDY,
        continuous_batching_config=batching(),
    )
    for name, tokens, output in zip(names, inputs, outputs, strict=True):
        assert output.generated_tokens == alone(name, tokens)
    assert len(served.store.resident()) < 8


def test_forks_keep_the_adapter(serve, alone, model, adapters):
    config = copy.deepcopy(GREEDY)
    config.num_return_sequences = 3  # the constructor wants beams or sampling for it
    names = ["a0", None, "a5", "a1"]
    inputs = [prompt(200 + i, 12 + i) for i in range(4)]
    for blocks in (64, 12):  # of the latter, forks have to begin anew
        outputs = serve().generate_batch(
            inputs,
            adapters=names,
            generation_config=config,
            continuous_batching_config=batching(num_blocks=blocks),
            max_new_tokens=10,
        )
        assert len(outputs) == 12
        for number, output in enumerate(outputs):
            place = number // 3
            assert output.generated_tokens == alone(names[place], inputs[place])


def test_a_cache_without_room_sends_requests_back(serve, alone):
    """Requests that are begun anew, with what they had, keep their adapters."""
    names = [EVERYONE[i % 9] for i in range(9)]
    inputs = [prompt(300 + i, 20) for i in range(9)]
    outputs = serve().generate_batch(
        inputs,
        adapters=names,
        generation_config=GREEDY,
        continuous_batching_config=batching(num_blocks=14, safety_margin=0.0),
        max_new_tokens=30,
    )
    for name, tokens, output in zip(names, inputs, outputs, strict=True):
        assert output.generated_tokens == alone(name, tokens, 30)


def test_cancelled_requests_give_their_room_back(serve, alone, adapters):
    served = serve(pool_bytes=ROWS_OF * max(map(size, adapters.values())))
    with served.continuous_batching(GREEDY, batching()) as manager:
        tokens = prompt(1, 9)
        manager.add_request(tokens, "running", 150, adapter="a0")
        wait(lambda: served.store.is_in_flight())
        manager.add_request(tokens, "parked", 150, adapter="a1")
        manager.add_request(tokens, "next", adapter="a2")
        manager.cancel_request("parked")
        manager.cancel_request("running")
        (output,) = manager.results(["next"])
        assert output.generated_tokens == alone("a2", tokens)
        wait(lambda: not served.store.is_in_flight())
        manager.add_request(tokens, "running", adapter="a1")  # the id is free again
        assert manager.results(["running"])[0].generated_tokens == alone("a1", tokens)


def test_staggered_while_adapters_come_and_go(serve, alone, model):
    names = [EVERYONE[(7 * number) % 9] for number in range(24)]
    known = [(name, prompt(400 + i), alone(name, prompt(400 + i))) for i, name in enumerate(names)]
    extras = []
    for number in range(24):
        slices, tokens = random_slices(model, 1000 + number), prompt(500 + number, 10)
        out = with_slices(model, slices).generate(torch.tensor([tokens]), GREEDY)
        extras.append((slices, tokens, out[0, 10:].tolist()))
    served = serve()
    with served.continuous_batching(GREEDY, batching()) as manager:
        wanted = {}
        for number in range(24):
            name, tokens, want = known[number]
            wanted[manager.add_request(tokens, adapter=name)] = want
            slices, tokens, want = extras[number]
            served.register("extra", slices)
            wanted[manager.add_request(tokens, adapter="extra")] = want
            served.unregister("extra")
            time.sleep(0.02)
        for output in manager.results(list(wanted)):
            assert output.generated_tokens == wanted[output.request_id]
    assert sorted(served.store.names()) == NAMES


def test_a_pool_full_of_pins_fails_a_request_rather_than_let_it_wait(serve, adapters):
    served = serve(pool_bytes=ROWS_OF * max(map(size, adapters.values())))
    largest = max(NAMES, key=lambda name: size(adapters[name]))
    served.store.pin(largest)
    other = next(name for name in NAMES if name != largest)
    with served.continuous_batching(GREEDY, batching()) as manager:
        ids = [manager.add_request([5, 6], adapter=name) for name in (other, largest)]
        failed, fine = manager.results(ids)
    assert "more rows are needed" in failed.error and not failed.generated_tokens
    assert fine.error is None and len(fine.generated_tokens) == 10
    served.store.unpin(largest)


def test_an_error_in_a_batch_ends_all_requests_and_leaves_nothing_behind(serve, adapters):
    served = serve(pool_bytes=ROWS_OF * max(map(size, adapters.values())))
    plan, calls = served.layers.assign, []

    def failing(assignment):
        calls.append(assignment)
        if len(calls) > 3:
            raise RuntimeError("injected")
        plan(assignment)

    served.layers.assign = failing
    with pytest.raises(RuntimeError, match="the manager does not run"):
        with served.continuous_batching(GREEDY, batching()) as manager:
            ids = [manager.add_request([5, 6], adapter=name) for name in ("a0", "a1", None)]
            outputs = manager.results(ids)
            assert all("injected" in output.error for output in outputs)
            manager.add_request([5, 6])
    assert not served.store.is_in_flight()
    assert not any("adapters" in name for name in schedulers.SCHEDULER_MAPPING)
    served.layers.assign = plan
    again = served.generate_batch(
        [[5]], adapters=["a1"], max_new_tokens=2, continuous_batching_config=batching()
    )
    assert again[0].error is None


def test_a_copy_that_fails_is_the_failure_of_its_request_alone(serve, alone, monkeypatch):
    served = serve()
    write, broken = served.store.pool.write, served.store.adapter("a1").rows

    def failing(runs, values):
        if values is broken:
            raise MemoryError("injected")
        write(runs, values)

    monkeypatch.setattr(served.store.pool, "write", failing)
    tokens = prompt(1, 9)
    with served.continuous_batching(GREEDY, batching()) as manager:
        ids = [manager.add_request(tokens, adapter=name) for name in ("a0", "a1", "a2")]
        outputs = manager.results(ids)
    assert outputs[1].error == "injected"
    for place, name in ((0, "a0"), (2, "a2")):
        assert outputs[place].generated_tokens == alone(name, tokens)


def test_an_exception_of_the_user_does_not_wait_for_answers(serve):
    served, began = serve(), time.monotonic()
    with pytest.raises(KeyError), served.continuous_batching(GREEDY, batching()) as manager:
        for number in range(40):
            manager.add_request([5, 6], max_new_tokens=300, adapter=NAMES[number % 8])
        raise KeyError
    assert time.monotonic() - began < 10
    assert not served.store.is_in_flight()


def test_streams_through_a_handler(serve, alone):
    """As the asyncio interface of transformers does it."""
    tokens, seen = prompt(1, 9), []

    async def run(manager):
        done = asyncio.Event()

        def handle(output):
            seen.append(list(output.generated_tokens))
            if output.is_finished():
                done.set()

        manager.register_result_handler("x", handle)
        manager.add_request(tokens, "x", streaming=True, adapter="a3")
        await asyncio.wait_for(done.wait(), 30)

    with serve().continuous_batching(GREEDY, batching()) as manager:
        asyncio.run(run(manager))
    assert seen == [alone("a3", tokens)[:number] for number in range(1, 11)]


def test_what_cannot_be_is_refused(serve):
    served = serve()
    with served.continuous_batching(GREEDY, batching()) as manager:
        manager.add_request([5], "x", 100, adapter="a0")
        cases = [
            (dict(input_ids=[5], adapter="no"), "no adapter is called 'no'"),
            (dict(input_ids=[5], max_new_tokens=0), "max_new_tokens must be positive, got 0"),
            (dict(input_ids=[]), "at least one token"),
            (dict(input_ids=[5, 97]), r"must lie in \[0, 97\), got values from 5 to 97"),
            (dict(input_ids=[-1, 9]), "got values from -1 to 9"),
            (dict(input_ids=[5], request_id="x"), "'x' is in use"),
            (dict(input_ids=[5], request_id="y__child#1"), "must not contain"),
            (dict(input_ids=[5] * 400, max_new_tokens=300), "at most .* tokens together"),
        ]
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                manager.add_request(**arguments)
        with pytest.raises(RuntimeError, match="while requests may be in flight"):
            served.switch("a0")
        for other in (served.rows(["a0"]), served.continuous_batching(GREEDY, batching())):
            with pytest.raises(RuntimeError, match="needs the model for itself"), other:
                pass
        assert manager.results(["x"])[0].error is None
    with served.rows(["a0"]), pytest.raises(RuntimeError, match="needs the model for itself"):
        served.generate_batch([[5]], adapters=["a0"])
    with pytest.raises(ValueError, match="one for each input"):
        served.generate_batch([[5]], adapters=[])
    for fields, message in [
        (dict(use_cuda_graph=True), "CUDA graphs or compilation"),
        (dict(use_cuda_graph=(False, True)), "CUDA graphs or compilation"),
        (dict(decode_compile_config=CompileConfig()), "CUDA graphs or compilation"),
        (dict(scheduler_type="best"), "scheduler_type must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            with served.continuous_batching(GREEDY, batching(**fields)):
                pass
    served.switch("a0")
    with pytest.raises(RuntimeError, match="written into the weights"):
        served.generate_batch([[5]], adapters=["a1"])
    served.switch(None)


def test_configurations_of_the_user_stay_as_they_are(serve):
    generation, config = GenerationConfig(max_new_tokens=3), batching()
    before = generation.to_dict(), dict(vars(config))
    serve().generate_batch(
        [[5, 6]],
        adapters=["a0"],
        generation_config=generation,
        continuous_batching_config=config,
    )
    assert (generation.to_dict(), dict(vars(config))) == before


def test_another_transformers_is_told(monkeypatch):
    monkeypatch.setitem(continuous._SEAMS, lambda tokens: None, ("request_id",))
    with pytest.raises(RuntimeError, match="tested with"):
        continuous.check_transformers()


def test_without_a_limit_the_cache_is_one(serve):
    unlimited = GenerationConfig(do_sample=False, pad_token_id=0)
    with serve().continuous_batching(unlimited, batching(num_blocks=10)) as manager:
        (output,) = manager.results([manager.add_request([5, 6, 7], adapter="a0")])
    assert output.error is None
    assert len(output.generated_tokens) == manager.max_request_tokens - 3
