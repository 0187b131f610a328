"""Threads that use one model at once: the base is never wrong, and every result is right."""

import random
import threading

import pytest
import torch
from model_states import assert_same, base_state
from peft import get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids()
CONFIGS = {
    "s2ft": dict(config=S2FTConfig(heads=2, channels=8, seed=3, mode="inplace")),
    "s2ft-permute": dict(config=S2FTConfig(heads=2, channels=8, seed=3, layout="permute")),
    "spiel": dict(config=SpIELConfig(num_tunable_weights=900, seed=3, mode="inplace")),
}
EVERY_METHOD = pytest.mark.parametrize("method", CONFIGS)


def trained(method):
    """A model with random deltas, its logits, and W0."""
    base = tiny_model("llama")
    original = base_state(base)
    model = get_peft_model(base, CONFIGS[method]["config"]).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "_delta" in name:
                noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
                delta.copy_(0.3 * noise)
    return model, model(IDS).logits.detach(), original


def run_all(*works):
    """Run the works in a thread each, from one moment on; raises what one of them raises."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work):
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]


@EVERY_METHOD
def test_first_forwards_of_four_threads(method):
    model, want, original = trained(method)
    results = []

    def run():
        results.append(model(IDS).logits.detach())

    for _ in range(5):
        model.state_dict()  # the weights hold W0 again
        run_all(run, run, run, run)
        assert len(results) == 4
        for logits in results:
            torch.testing.assert_close(logits, want, rtol=0, atol=1e-12)
        results.clear()
        assert_same(base_state(model), original)


@pytest.mark.slow
@EVERY_METHOD
def test_running_and_saving_at_once(method):
    """What is saved is W0 and stays it, whatever is written into the weights afterwards."""
    model, want, original = trained(method)
    rng = random.Random(0)
    saved = []

    def run():
        for _ in range(rng.randint(1, 4)):
            logits = model(IDS).logits.detach()
            torch.testing.assert_close(logits, want, rtol=0, atol=1e-12)

    def save():
        for _ in range(rng.randint(1, 3)):
            saved.append({k: v for k, v in model.state_dict().items() if "_delta" not in k})

    for _ in range(200):
        run_all(run, save)
        for state in saved[-1:]:
            for name, value in state.items():
                own = name.removeprefix("base_model.model.").replace(".base_layer", "")
                if own in original:
                    assert torch.equal(value, original[own]), name
        saved.clear()
    assert_same(base_state(model), original)


@pytest.mark.slow
@EVERY_METHOD
def test_training_and_saving_at_once(method):
    """Gradients are those of a training that nobody disturbs."""
    if method == "s2ft-permute":
        pytest.skip("to give permuted weights back between forward and backward is an error")
    model, _, original = trained(method)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def gradient():
        return torch.autograd.grad(model(inputs_embeds=x).logits.square().sum(), x)[0]

    want = gradient()
    done = threading.Event()

    def train():
        try:
            for _ in range(30):
                torch.testing.assert_close(gradient(), want, rtol=0, atol=1e-11)
        finally:
            done.set()

    def save():
        while not done.is_set():
            model.state_dict()

    run_all(train, save)
    assert_same(base_state(model), original)


def test_a_mixed_batch_of_one_thread_is_not_that_of_another():
    model, want, _ = trained("s2ft")
    model.add_adapter("second", S2FTConfig(heads=2, channels=8, seed=9, mode="auto"))
    with model.disable_adapter():
        base = model(IDS).logits.detach()
    results = {"mixed": [], "plain": []}

    def mixed():
        for _ in range(10):
            names = ["__base__"] * len(IDS)
            results["mixed"].append(model(input_ids=IDS, adapter_names=names).logits.detach())

    def plain():
        for _ in range(10):
            results["plain"].append(model(IDS).logits.detach())

    run_all(mixed, plain)
    for key, expected in (("mixed", base), ("plain", want)):
        for logits in results[key]:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
