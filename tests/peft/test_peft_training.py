"""Every mode and layout trains the same, and a backward is that of its own forward."""

import warnings

import pytest
import torch
from model_states import assert_same, base_state
from peft import get_peft_model
from s2ft_models import (
    COMBINATIONS,
    EVERY_COMBINATION,
    EVERY_PROJECTION,
    WIDE,
    assert_own_gradient_despite_a_later_pass,
    config,
    deltas,
    indices,
    randomized,
    train,
)
from tiny_models import MODEL_TYPES, tiny_model, token_ids
from transformers.pytorch_utils import Conv1D

from bench.measure.memory import kept_by
from s2kernels import backend, kernels, reference

NUM_PROJECTIONS = dict(
    phi3=8, gpt2=8, gpt_neox=8, opt=12, bert=12, roberta=12, mixtral=12, qwen3_moe=13
)


def with_indices(model, indices):
    """Gives the adapter these channels, as loading one does."""
    state = {name.replace("s2ft_delta", "s2ft_index"): index for name, index in indices.items()}
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "every_projection"),
    # o+down are among all: alone, they are trained once as linears, as Conv1D and as experts.
    [
        *((name, False) for name in ("llama", "gpt2", "mixtral")),
        *((name, True) for name in MODEL_TYPES),
    ],
    ids=lambda value: {False: "o+down", True: "all"}.get(value, value),
)
def test_every_mode_and_layout_follows_the_same_trajectory(model_type, every_projection):
    """From the channels that layout="block" draws, which every layout can train."""
    targets = EVERY_PROJECTION.get(model_type, "all-linear") if every_projection else None
    chosen = None
    reference = None
    for mode, layout in [("additive", "block"), *COMBINATIONS]:
        model = tiny_model(model_type, **WIDE)
        model = get_peft_model(
            model, config(mode=mode, layout=layout, target_modules=targets)
        ).train()
        chosen = chosen or indices(model)
        with_indices(model, chosen)
        losses = train(model, steps=20)
        result = torch.tensor(losses), [d.detach().clone() for d in deltas(model).values()]
        if reference is None:
            reference = result
            assert losses[-1] < 0.8 * losses[0]
        difference = max(
            (got - want).abs().max().item()
            for got, want in zip(
                [result[0], *result[1]], [reference[0], *reference[1]], strict=True
            )
        )
        assert difference <= 1e-10, (mode, layout)


@EVERY_COMBINATION
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_those_of_dense_autograd_on_the_slices(model_type, mode, layout):
    ids = token_ids()
    targets = EVERY_PROJECTION.get(model_type, "all-linear")
    fields = dict(mode=mode, layout=layout, target_modules=targets)
    model = randomized(get_peft_model(tiny_model(model_type, **WIDE), config(**fields)))
    model(input_ids=ids, labels=ids).loss.backward()

    dense = tiny_model(model_type, **WIDE).requires_grad_(True)
    slices = {}
    for name, delta in deltas(model).items():
        module = name.removeprefix("base_model.model.").removesuffix(".s2ft_delta.default")
        index = model.get_buffer(name.replace("s2ft_delta", "s2ft_index")).long()
        is_in = int(model.get_buffer(name.replace("s2ft_delta", "s2ft_dim"))) == 1
        if index.dim() == 2:  # of experts
            weight, where = dense.get_parameter(module), (torch.arange(4).unsqueeze(1), index)
        else:
            weight, where = dense.get_submodule(module).weight, (index,)
        is_conv1d = index.dim() == 1 and isinstance(dense.get_submodule(module), Conv1D)
        transposed = is_in != is_conv1d  # the trained channels are then columns
        with torch.no_grad():
            (weight.mT if transposed else weight)[where] += delta.mT if is_in else delta
        slices[name] = (weight, transposed, where, is_in)
    dense(input_ids=ids, labels=ids).loss.backward()
    assert len(slices) == NUM_PROJECTIONS.get(model_type, 14)
    for name, (weight, transposed, where, is_in) in slices.items():
        grad = (weight.grad.mT if transposed else weight.grad)[where]
        got, want = deltas(model)[name].grad, grad.mT if is_in else grad
        assert want.abs().max() > 1e-8
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)


@EVERY_COMBINATION
def test_the_device_trains_as_fp64_on_the_cpu_does(mode, layout, device):
    """On a GPU this is the host on the compiled kernels."""
    ids = token_ids(batch=3)
    losses = []
    for dtype, where in ((torch.float64, "cpu"), (torch.float32, device)):
        model = tiny_model("llama", dtype, **WIDE).to(where)
        model = get_peft_model(model, config(mode=mode, layout=layout)).train()
        losses.append(torch.tensor(train(model, steps=8, ids=ids.to(where)), dtype=torch.float64))
        assert all(
            delta.device.type == torch.device(where).type for delta in deltas(model).values()
        )
    assert (losses[0] - losses[1]).abs().max() < 1e-4


@pytest.mark.slow
@EVERY_COMBINATION
@pytest.mark.parametrize("model_type", ("llama", "gpt2"))  # gpt2's weights are transposed
def test_the_host_runs_on_the_triton_kernels(model_type, mode, layout, device, monkeypatch):
    """Every op of a step, dense GEMMs included, from `s2kernels.kernels`."""
    ids = token_ids().to(device)
    grads = []
    for ops in (reference, kernels):
        monkeypatch.setattr(backend, "select", lambda x, impl=None, ops=ops: ops)
        model = tiny_model(model_type, torch.float32, **WIDE).to(device)
        fields = dict(mode=mode, layout=layout, target_modules="all-linear")
        model = randomized(get_peft_model(model, config(**fields)))
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
        with model.disable_adapter():
            model(ids)
        assert_same(
            base_state(model), base_state(tiny_model(model_type, torch.float32, **WIDE).to(device))
        )
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_inference_mode_first_then_training():
    model = get_peft_model(tiny_model("llama", **WIDE), config())
    with torch.inference_mode():
        model(token_ids())
    losses = train(model.train(), steps=5)
    assert losses[-1] < losses[0]


@EVERY_COMBINATION
def test_a_part_of_the_model_can_be_called_alone(mode, layout):
    """Its slices are those of now, not of the last forward of the whole."""
    ids = token_ids()
    model = get_peft_model(tiny_model("llama", **WIDE), config(mode=mode, layout=layout))
    model(ids)
    randomized(model)
    inner = model.base_model.model.model
    hidden = inner(ids).last_hidden_state
    want = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, want, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compile():
    ids = token_ids()
    for mode, layout, fullgraph in (("additive", "gather", True), ("inplace", "permute", False)):
        torch._dynamo.reset()
        fields = dict(mode=mode, layout=layout)
        model = randomized(get_peft_model(tiny_model("llama", **WIDE), config(**fields)))
        model(input_ids=ids, labels=ids).loss.backward()
        want = [delta.grad.clone() for delta in deltas(model).values()]
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
            compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for delta, grad in zip(deltas(model).values(), want, strict=True):
            torch.testing.assert_close(delta.grad, grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", (True, False))
@EVERY_COMBINATION
def test_gradient_checkpointing_trains_the_same(mode, layout, use_reentrant):
    ids = token_ids()
    grads = []
    for checkpointing in (False, True):
        model = randomized(
            get_peft_model(tiny_model("llama", **WIDE), config(mode=mode, layout=layout))
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_a_checkpoint_is_computed_again_with_the_deltas_as_they_are(use_reentrant):
    """Though a forward with others has come in between, as of a perturbation or of an average."""
    grads = []
    for change in (0.0, 1.0):
        model = randomized(get_peft_model(tiny_model("llama", **WIDE), config())).train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        for sign in (1, -1):
            for delta in deltas(model).values():
                delta.data.add_(sign * change)
            if sign == 1:
                model(token_ids())
        loss.backward()
        grads.append([delta.grad for delta in deltas(model).values()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fuse", (True, False), ids=("fused", "apart"))
@EVERY_COMBINATION
def test_saved_activations_are_those_of_the_floor_plus_the_slices(mode, layout, fuse):
    """The floor saves gate, silu(gate) and up of every FFN. Fused, a FFN saves gate and up, and the
    slice of neither.
    """
    ids = token_ids(batch=4, length=16)

    def saved(model):
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        kept = kept_by(lambda: model(input_ids=ids, labels=ids).loss, model)
        assert kept.unseen == 0
        return kept.saved

    floor = saved(tiny_model("llama", torch.float32, **WIDE).requires_grad_(False).train())
    model = tiny_model("llama", torch.float32, **WIDE)
    model = get_peft_model(model, config(mode=mode, layout=layout, fuse=fuse)).train()
    model(ids)  # the base slices exist from the first forward on
    of_ffn = 2 * 192 if fuse else 0
    trained = [index for name, index in indices(model).items() if "mlp" not in name or not fuse]
    num_trained = sum(index.numel() for index in trained)
    assert saved(model) - floor == 4 * 16 * (num_trained - of_ffn) * 4


@pytest.mark.parametrize("first", ("base", "both"))
def test_a_pass_of_the_slices_written_later_changes_no_gradient(first):
    fields = dict(layout="gather", target_modules="all-linear")
    model = get_peft_model(tiny_model("llama", **WIDE), config(**fields))
    model.add_adapter("second", config(seed=7, **fields))
    assert_own_gradient_despite_a_later_pass(randomized(model), first)
