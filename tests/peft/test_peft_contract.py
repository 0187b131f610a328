"""What PEFT promises of every method, held by both of ours: configurations, heads, injection."""

import copy

import pytest
import torch
from adapter_models import EVERY_CONFIG, deltas, layers, randomized
from peft import PeftModel, get_model_status, get_peft_model
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from s2kernels.peft import S2FTConfig, SpIELConfig

IDS = token_ids(batch=3)
SIZES = dict(vocab_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
BERT |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def made(auto, model_type, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(model_type, **SIZES, **fields))
    return model.eval()


def names(model):
    return [name for name, _ in model.named_modules()]


# Configurations


@EVERY_CONFIG
@pytest.mark.parametrize(
    "fields", ({}, dict(target_modules="all-linear"), dict(target_modules=["o_proj", "up_proj"]))
)
def test_the_configuration_stays_the_callers_object_as_it_was(config, fields, tmp_path):
    given = config(**fields)
    before = copy.deepcopy(given)
    model = randomized(get_peft_model(tiny_model("llama"), given))
    assert model.peft_config["default"] is given
    assert model.base_model.model.peft_config["default"] is given
    assert given == before
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded(IDS).logits, want)
    assert isinstance(loaded.peft_config["default"].target_modules, set)


@EVERY_CONFIG
def test_each_model_saves_what_it_made_of_a_shared_configuration(config, tmp_path):
    shared = (
        config(target_modules="all-linear", layout="gather") if config is S2FTConfig else config()
    )
    bases = dict(small=tiny_model("llama"), other=tiny_model("opt", ffn_dim=80))
    models = {name: randomized(get_peft_model(base, shared)) for name, base in bases.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name, model in models.items():
        fresh = tiny_model("llama") if name == "small" else tiny_model("opt", ffn_dim=80)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / name)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# Tasks


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return made(AutoModelForSeq2SeqLM, "t5", **sizes, decoder_start_token_id=0)


def bart():
    ffn = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, max_position_embeddings=64)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    depth = dict(encoder_layers=2, decoder_layers=2)
    sizes = dict(d_model=32, decoder_start_token_id=2, forced_eos_token_id=None)
    return made(AutoModelForSeq2SeqLM, "bart", **sizes, **ffn, **heads, **depth)


def labels_of(task):
    if task == "SEQ_CLS":
        return dict(labels=torch.tensor([0, 1, 1]))
    if task == "QUESTION_ANS":
        return dict(start_positions=torch.tensor([1, 2, 3]), end_positions=torch.tensor([4, 4, 5]))
    return dict(labels=IDS % 2)


TASKS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "classifier"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@EVERY_CONFIG
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("given_name", (False, True))
def test_heads_are_trained_saved_and_loaded_whole(config, task, given_name, tmp_path):
    auto, head = TASKS[task]
    whole = dict(modules_to_save=["pooler"]) if given_name and task == "SEQ_CLS" else {}
    given = config(task_type=task, **whole)
    model = get_peft_model(made(auto, "bert", **BERT), given)
    assert model.peft_config["default"] is given
    assert head in given.modules_to_save
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        model(IDS, **labels_of(task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert any(f"{head}.modules_to_save.default" in name for name in changed)
    assert any("_delta.default" in name for name in changed)
    assert all(".default" in name for name in changed)
    want = model(IDS, **labels_of(task)).loss
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made(auto, "bert", **BERT), tmp_path)
    torch.testing.assert_close(loaded(IDS, **labels_of(task)).loss, want)
    model.add_adapter("second", config(task_type=task))
    model.set_adapter("second")
    fresh = made(auto, "bert", **BERT)(IDS, **labels_of(task)).loss
    torch.testing.assert_close(model(IDS, **labels_of(task)).loss, fresh)


@EVERY_CONFIG
@pytest.mark.parametrize("base", (t5, bart))
def test_encoder_decoders_are_trained_saved_and_loaded(config, base, tmp_path):
    fields = dict(layout="gather") if config is S2FTConfig else {}
    given = config(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", **fields)
    model = randomized(get_peft_model(base(), given))
    plain = base()(input_ids=IDS, labels=IDS).loss
    loss = model(input_ids=IDS, labels=IDS).loss
    assert (loss - plain).abs() > 1e-3
    loss.backward()
    assert all(delta.grad.abs().sum() > 0 for delta in deltas(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS, labels=IDS).loss, loss)


@EVERY_CONFIG
def test_feature_extraction(config, tmp_path):
    model = get_peft_model(made(AutoModel, "bert", **BERT), config(task_type="FEATURE_EXTRACTION"))
    want = randomized(model)(IDS).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(made(AutoModel, "bert", **BERT), tmp_path)
    torch.testing.assert_close(loaded(IDS).last_hidden_state, want)


# Targets


def deep(num=4):
    return tiny_model("llama", num_hidden_layers=num)


@EVERY_CONFIG
@pytest.mark.parametrize("num", (2, 4))
@pytest.mark.parametrize("chosen", ([0], 1, [0, 1]))
@pytest.mark.parametrize("pattern", (None, "layers", ["blocks", "layers"]))
def test_layers_to_transform_chooses_among_all_linear_layers(
    config, num, chosen, pattern, tmp_path
):
    """Also where PEFT shortens the names of the targets, from 20 of them on."""
    budget = dict(num_tunable_weights=1000) if config is SpIELConfig else {}
    fields = dict(layers_to_transform=chosen, layers_pattern=pattern, **budget)
    given = config(target_modules="all-linear", **fields)
    model = randomized(get_peft_model(deep(num), given))
    wanted = {f"model.layers.{i}" for i in ([chosen] if isinstance(chosen, int) else chosen)}
    found = [layer.name for layer in layers(model)]
    assert {".".join(name.split(".")[:3]) for name in found} == wanted
    assert len(found) == 7 * len(wanted)
    if config is SpIELConfig:
        assert 1000 - len(found) <= sum(map(len, deltas(model))) <= 1000
    assert given.layers_to_transform == chosen
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deep(num), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = get_peft_model(deep(num), config.from_pretrained(tmp_path))
    assert [layer.name for layer in layers(again)] == found


@EVERY_CONFIG
def test_layers_to_transform_of_many_full_names(config, tmp_path):
    """PEFT takes full names as they are, and shortened ones, from 20 on, only in these layers."""
    full = [name for name in names(deep()) if name.endswith("_proj")]
    assert len(full) >= 20
    model = get_peft_model(deep(), config(target_modules=full, layers_to_transform=[1]))
    assert {layer.name.split(".")[2] for layer in layers(model)} == {"1"}
    randomized(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deep(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@EVERY_CONFIG
def test_layers_to_transform_that_are_not_there(config):
    model = deep(2)
    before = names(model)
    with pytest.raises(ValueError, match=r"layers_to_transform=\[7\] names no layer"):
        get_peft_model(model, config(target_modules="all-linear", layers_to_transform=[7]))
    assert names(model) == before


# Ways in


@EVERY_CONFIG
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("how", ("from_pretrained", "load_adapter", "transformers"))
def test_low_cpu_mem_usage_loads_deltas_bit_for_bit(config, dtype, how, tmp_path):
    model = randomized(get_peft_model(tiny_model("llama", dtype), config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    want, base = deltas(model), tiny_model("llama", dtype)
    if how == "from_pretrained":
        loaded, name = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True), "default"
    elif how == "load_adapter":
        loaded, name = get_peft_model(base, config(seed=9)), "second"
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        loaded.set_adapter("second")
    else:
        loaded, name = base, "default"
        loaded.load_adapter(tmp_path, low_cpu_mem_usage=True)
    for got, delta in zip(deltas(loaded, name), want, strict=True):
        assert got.dtype == delta.dtype == torch.float32
        assert torch.equal(got, delta) and not torch.equal(delta, delta.to(dtype).float())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@EVERY_CONFIG
def test_the_status_names_the_method(config):
    model = get_peft_model(tiny_model("llama"), config())
    method = config.__name__.removesuffix("Config").upper()
    assert get_model_status(model).peft_types == {"default": method}
    assert model.peft_config["default"].peft_type == method
    assert config().to_dict()["peft_type"] == method


# Mixed batches


def of_rows(model, chosen, call):
    """What `call` gives for each row alone, with its own adapter."""
    rows = []
    for row, name in enumerate(chosen):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(IDS[row : row + 1]))
        else:
            model.set_adapter(name)
            rows.append(call(IDS[row : row + 1]))
    return rows


@pytest.mark.parametrize("beams", (1, 2, 3))
@pytest.mark.parametrize("base", (t5, bart))
def test_a_mixed_batch_of_an_encoder_decoder(base, beams):
    """Beam search repeats the rows of the decoder alone."""
    fields = dict(layout="gather", target_modules="all-linear", channels=16)
    model = get_peft_model(base().double(), S2FTConfig(**fields)).eval()
    model.add_adapter("second", S2FTConfig(**fields, seed=9))
    randomized(randomized(model), "second", seed=8)
    chosen = ["second", "__base__", "default"]
    options = dict(max_new_tokens=6, do_sample=False, num_beams=beams, num_return_sequences=beams)
    options |= dict(return_dict_in_generate=True, output_scores=True, length_penalty=0.0)

    def call(ids, **kwargs):
        out = model.generate(input_ids=ids, **options, **kwargs)
        return out.sequences, out.scores[0]

    alone = of_rows(model, chosen, call)
    sequences, scores = call(IDS, adapter_names=chosen)
    for row, (want, want_scores) in enumerate(alone):
        here = slice(row * beams, row * beams + beams)
        length = min(want.shape[1], sequences.shape[1])
        assert torch.equal(sequences[here, :length], want[:, :length])
        torch.testing.assert_close(scores[here], want_scores)
    assert len({tuple(map(float, want_scores[0])) for _, want_scores in alone}) == 3


@pytest.mark.parametrize("beams", (1, 2))
def test_a_mixed_batch_of_flattened_rows(beams):
    """OPT joins the tokens of all rows in front of its FFN."""
    targets = dict(target_modules=["fc1", "fc2", "out_proj"])
    model = get_peft_model(tiny_model("opt"), S2FTConfig(**targets)).eval()
    model.add_adapter("second", S2FTConfig(**targets, seed=9))
    randomized(randomized(model), "second", seed=8)
    chosen = ["second", "__base__", "default"]
    alone = of_rows(model, chosen, lambda ids: model(input_ids=ids).logits)
    mixed = model(input_ids=IDS, adapter_names=chosen).logits
    torch.testing.assert_close(mixed, torch.cat(alone))
    options = dict(max_new_tokens=4, do_sample=False, num_beams=beams)
    together = model.generate(input_ids=IDS, adapter_names=chosen, **options)
    for row, want in enumerate(of_rows(model, chosen, lambda ids: model.generate(ids, **options))):
        assert torch.equal(together[row : row + 1, : want.shape[1]], want)


def test_rows_that_nobody_can_tell_apart_are_refused():
    """Tokens that a mixture has routed are no rows of the batch, however many they are."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "unheard_of"})()
            self.expert = nn.Linear(12, 12)

        def forward(self, x):
            return self.expert(x.flatten(0, 1)[[0, 5, 2, 1, 3, 4]])

    fields = dict(target_modules=["expert"], layout="gather", channels=5)
    model = get_peft_model(Routed(), S2FTConfig(**fields)).eval()
    with pytest.raises(ValueError, match="each of the 6 rows of the batch, got 3"):
        model(torch.randn(3, 2, 12), adapter_names=["default"] * 3)
