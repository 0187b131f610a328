"""Many adapters in one batch of a model of transformers, and the switch and fusion of them."""

import threading

import pytest
import torch
from model_states import assert_same
from peft import get_peft_model
from quantized_models import KINDS, quantized
from served_models import DIMS, llama, random_slices, state, with_slices
from tiny_models import MODEL_TYPES, tiny_model

from s2kernels.adapter import Slice
from s2kernels.peft import S2FTConfig, save_pretrained
from s2kernels.serve import Serving
from s2kernels.serve.store import NoRoom

NAMES = [f"a{number}" for number in range(5)]
POOL = 2**22  # bytes


@pytest.fixture(scope="module")
def written(model, adapters):
    """The model with each adapter in its weights, and the base."""
    return {None: model} | {name: with_slices(model, adapters[name]) for name in NAMES}


@pytest.fixture
def serving(model, adapters):
    served = Serving(model, pool_bytes=POOL)
    for name, slices in adapters.items():
        served.register(name, slices)
    yield served
    served.close()


def prompts(rows, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, length), generator=generator)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


MIXTURES = [
    ["a0"],
    [None],
    ["a0", "a1", "a2", "a3", "a4", None],
    ["a3", None, "a3", "a1", None, "a3"],
    ["a2", "a2", "a2"],
]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("length", [1, 7, 30])
def test_every_row_is_as_if_alone(serving, written, mixture, length):
    ids = prompts(len(mixture), length)
    with serving.rows(mixture):
        got = logits(serving.model, ids)
    for row, name in enumerate(mixture):
        want = logits(written[name], ids[row : row + 1])[0]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


def test_outside_of_the_calls_the_model_is_the_base(serving, model):
    ids = prompts(3)
    base = logits(llama(), ids)
    with serving.rows(["a0", "a1", None]):
        assert not torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), base)


def test_rows_of_the_base_are_those_of_the_base_alone(serving):
    ids = prompts(3)
    base = logits(serving.model, ids)
    with serving.rows(["a1", None, "a2"]):
        assert torch.equal(logits(serving.model, ids)[1], base[1])


def test_generate_with_an_adapter_for_each_prompt(serving, written):
    mixture = ["a0", None, "a4", "a1", "a0"]
    ids = prompts(len(mixture))
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    got = serving.generate(ids, adapters=mixture, **options)
    for row, name in enumerate(mixture):
        want = written[name].generate(ids[row : row + 1], **options)
        assert torch.equal(got[row], want[0]), name
    assert len({tuple(row.tolist()) for row in got[[0, 2, 3]]}) == 3


def test_beams_belong_to_their_prompt(serving, written):
    mixture = ["a0", None, "a1"]
    ids = prompts(len(mixture))
    options = dict(max_new_tokens=8, num_beams=3, num_return_sequences=2, pad_token_id=0)
    got = serving.generate(ids, adapters=mixture, **options)
    for row, name in enumerate(mixture):
        want = written[name].generate(ids[row : row + 1], **options)
        assert torch.equal(got[2 * row : 2 * row + 2], want)


def test_threads_have_rows_of_their_own(serving, written):
    wanted, got = {}, {}
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    for number in range(12):
        name = [*NAMES, None][number % 6]
        wanted[number] = written[name].generate(prompts(1, 5, number), **options)

    def work(numbers):
        for number in numbers:
            name = [*NAMES, None][number % 6]
            got[number] = serving.generate(prompts(1, 5, number), adapters=[name], **options)

    threads = [threading.Thread(target=work, args=(range(i, 12, 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], want) for number, want in wanted.items())
    assert not serving.store.is_in_flight()


def test_padded_prompts(serving, written):
    ids = prompts(3, 9)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    mixture, options = ["a1", "a2", None], dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    got = serving.generate(ids, adapters=mixture, attention_mask=mask, **options)
    for row, name in enumerate(mixture):
        want = written[name].generate(
            ids[row : row + 1], attention_mask=mask[row : row + 1], **options
        )
        assert torch.equal(got[row], want[0])


def test_a_pool_that_is_too_small_for_all_serves_them_one_after_another(model, adapters, written):
    rows = max(sum(len(p.index) for p in slices.values()) for slices in adapters.values())
    small = Serving(model, pool_bytes=rows * 32 * 4)
    small.store.pool.rows.fill_(float("nan"))
    for name, slices in adapters.items():
        small.register(name, slices)
    ids = prompts(1)
    for name in [*NAMES, "a0", None, "a3"]:
        with small.rows([name]):
            got = logits(model, ids)
        torch.testing.assert_close(got, logits(written[name], ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(NoRoom):
        small.generate(prompts(2), adapters=["a0", "a1"])
    small.close()


def test_an_adapter_taken_in_later_may_train_other_layers(serving, model):
    extra = random_slices(model, 77, ["q_proj"])
    only_down = random_slices(model, 78, ["down_proj"])
    serving.register("q", extra)
    serving.register("down", only_down)
    ids = prompts(2)
    with serving.rows(["q", "down"]):
        got = logits(model, ids)
    for row, slices in enumerate((extra, only_down)):
        want = logits(with_slices(model, slices), ids[row : row + 1])[0]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = llama(dtype)
    slices = {
        name: Slice(part.dim, part.index, part.delta.to(dtype))
        for name, part in random_slices(model, 1, list(DIMS)).items()
    }
    served, ids = Serving(model, pool_bytes=POOL), prompts(2)
    served.register("a", slices)
    with served.rows(["a", None]):
        got = logits(model, ids)
    want = logits(with_slices(model, slices), ids)[0]
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=0.1, atol=0.1)
    torch.testing.assert_close(got[0], want, **tolerance)
    served.close()


def test_gpt2():
    model = tiny_model("gpt2", torch.float64)
    part = Slice("in", torch.tensor([39, 0, 2], dtype=torch.int32), torch.randn(32, 3).double())
    served, ids = Serving(model, pool_bytes=POOL), torch.randint(3, 48, (2, 6))
    served.register("a", {"transformer.h.0.mlp.c_proj": part})
    with served.rows(["a", None]):
        got = logits(model, ids)
    base = logits(model, ids)
    served.switch("a")
    torch.testing.assert_close(got, torch.cat([logits(model, ids)[:1], base[1:]]))
    served.close()
    assert torch.equal(logits(model, ids), base)


def test_switch_and_fuse(serving, model, adapters):
    ids, base = prompts(2), state(model)
    serving.switch("a0")
    want = logits(with_slices(llama(), adapters["a0"]), ids)
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-5, atol=1e-5)
    serving.fuse(["a0", "a1", "a2"], [0.5, 1.0, -2.0])
    scaled = [
        {n: Slice(p.dim, p.index, p.delta * weight) for n, p in adapters[name].items()}
        for name, weight in (("a0", 0.5), ("a1", 1.0), ("a2", -2.0))
    ]
    fused = with_slices(llama(), *scaled)
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    serving.switch(None)
    assert_same(model.state_dict(), base)


def test_overlap_is_summed_or_refused(model):
    name = "model.layers.0.mlp.down_proj"
    index = torch.tensor([1, 5], dtype=torch.int32)
    served, base = Serving(model, pool_bytes=POOL), model.get_submodule(name).weight.clone()
    parts = [Slice("in", index + shift, torch.randn(32, 2)) for shift in (0, 4, 7)]
    for letter, part in zip("abc", parts, strict=True):
        served.register(letter, {name: part})
    with pytest.raises(ValueError, match="down_proj: 1 channels are trained by more than one of a"):
        served.fuse(["a", "b"], overlap="refuse")
    assert torch.equal(model.get_submodule(name).weight, base)
    served.fuse(["a", "c"], overlap="refuse")
    served.fuse(["a", "b"], [1.0, 3.0])
    want = base.clone()
    want[:, 1] = base[:, 1] + parts[0].delta[:, 0]
    want[:, 5] = base[:, 5] + (parts[0].delta[:, 1] + 3.0 * parts[1].delta[:, 0])
    want[:, 9] = base[:, 9] + 3.0 * parts[1].delta[:, 1]
    assert torch.equal(model.get_submodule(name).weight, want)
    served.close()
    assert torch.equal(model.get_submodule(name).weight, base)


def test_nothing_is_switched_under_a_batch_and_no_batch_runs_over_a_switch(serving):
    with serving.rows(["a0"]):
        for change in (lambda: serving.switch("a1"), lambda: serving.fuse(["a1"])):
            with pytest.raises(RuntimeError, match="while requests may be in flight"):
                change()
        with pytest.raises(RuntimeError, match="within another batch"), serving.rows(["a1"]):
            pass
    serving.switch("a1")
    with pytest.raises(RuntimeError, match="written into the weights"):
        serving.generate(prompts(1), adapters=["a0"])
    serving.switch(None)
    assert serving.generate(prompts(1), adapters=["a0"], max_new_tokens=2).shape == (1, 9)


def test_what_cannot_be_is_refused(serving, model):
    with pytest.raises(ValueError, match="no adapter is called 'no'"), serving.rows(["no"]):
        pass
    with pytest.raises(ValueError, match="adapters must name one for each row"), serving.rows([]):
        pass
    with serving.rows(["a0", "a1"]):
        with pytest.raises(ValueError, match="the batch has 3 rows, which is no multiple of the 2"):
            logits(model, prompts(3))
        with pytest.raises(RuntimeError, match="without gradients"):
            model(input_ids=prompts(2))
        with pytest.raises(TypeError, match="torch.float32, the dtype of the model"):
            with torch.autocast("cpu", torch.bfloat16):
                logits(model, prompts(2))
    for arguments, message in [
        (dict(names=["a0"], overlap="max"), "overlap must be one of"),
        (dict(names=["a0"], weights=[1.0, 2.0]), "one weight per adapter"),
        (dict(names=[]), "one weight per adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            serving.fuse(**arguments)
    with pytest.raises(ValueError, match="pool_bytes must hold at least one row"):
        Serving(model, pool_bytes=100)
    assert not serving.store.is_in_flight()


def test_close_takes_the_hooks_off():
    model = llama()
    served = Serving(model, pool_bytes=POOL)
    served.register("a", random_slices(model, 1))
    served.switch("a")
    base = state(llama())
    served.close()
    assert_same(model.state_dict(), base)
    assert not any(module._forward_hooks for module in model.modules())


def test_adapters_as_they_are_trained_and_saved(tmp_path):
    """Of the tuner, with random deltas, from its folders: tokens and logits are PEFT's."""
    names, tuned = ["x", "y", "z"], None
    for seed, name in enumerate(names):
        config = S2FTConfig(heads=2, channels=5, seed=seed, task_type="CAUSAL_LM")
        if tuned is None:
            tuned = get_peft_model(llama(), config, adapter_name=name)
        else:
            tuned.add_adapter(name, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if "s2ft_delta" in parameter_name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    save_pretrained(tuned.eval(), tmp_path)
    served, ids = Serving(llama(), pool_bytes=POOL), prompts(1)
    for name in names:
        served.register(name, tmp_path / name)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    got = served.generate(ids.expand(3, -1), adapters=names, **options)
    seen = set()
    for row, name in enumerate(names):
        tuned.set_adapter(name)
        assert torch.equal(got[row], tuned.generate(input_ids=ids, **options)[0])
        served.switch(name)
        want = logits(tuned, ids)
        torch.testing.assert_close(logits(served.model, ids), want, rtol=1e-5, atol=1e-5)
        served.switch(None)
        seen.add(tuple(got[row].tolist()))
    assert len(seen) == 3
    served.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_served_and_not_switched(kind):
    """Against a product with the dense delta, added to what each layer computes."""
    model = quantized(kind)
    generator = torch.Generator().manual_seed(0)
    slices = {}
    for layer in range(2):
        for role, dim, channels in (("mlp.down_proj", "in", 128), ("self_attn.q_proj", "out", 64)):
            index = torch.randperm(channels, generator=generator)[:7].int()
            delta = torch.randn((64, 7) if dim == "in" else (7, 64), generator=generator)
            slices[f"model.layers.{layer}.{role}"] = Slice(dim, index, 0.3 * delta)
    served, ids = Serving(model, pool_bytes=POOL), torch.randint(3, 48, (2, 6))
    served.register("a", slices)
    base = logits(model, ids)
    with served.rows(["a", None]):
        got = logits(model, ids)
    with pytest.raises(ValueError, match="only a dense floating weight"):
        served.switch("a")
    served.close()
    assert torch.equal(logits(model, ids), base)

    def adding(part):
        def hook(module, args, output):
            wide = torch.zeros(module.out_features, module.in_features)
            wide.index_add_(part.axis, part.index.long(), part.delta)
            return output + args[0] @ wide.t()

        return hook

    for name, part in slices.items():
        model.get_submodule(name).register_forward_hook(adding(part))
    torch.testing.assert_close(got[0], logits(model, ids)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], base[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in MODEL_TYPES if "bert" not in kind])
def test_every_model_type(kind):
    """Input channels of all linear layers that give the hidden size; some see flattened tokens."""
    model, slices = tiny_model(kind), {}
    generator = torch.Generator().manual_seed(0)
    served = Serving(model, pool_bytes=POOL)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or "lm_head" in name or "embed" in name:
            continue
        try:
            N, K = served.switcher.shape(name)
        except ValueError:
            continue
        if N == 32:
            index = torch.randperm(K, generator=generator)[:3].int()
            delta = 0.3 * torch.randn(N, 3, generator=generator).double()
            slices[name] = Slice("in", index, delta)
    assert len(slices) >= 2
    served.register("a", slices)
    ids = torch.randint(3, 48, (3, 6), generator=generator)
    base = logits(model, ids)
    with served.rows([None, "a", None]):
        got = logits(model, ids)
    served.switch("a")
    want = torch.stack([base[0], logits(model, ids)[1], base[2]])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got[1], base[1])
    served.close()
    assert torch.equal(logits(model, ids), base)
