"""Training loops that others wrote: transformers' Trainer, TRL's SFTTrainer and DPOTrainer."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model, token_ids
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from s2kernels.peft import S2FTConfig, S2FTLinear, SpIELConfig, SpIELLinear

MODES = ("inplace", "additive")
COMMON = dict(
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    seed=0,
)


def config(mode):
    return S2FTConfig(heads=2, channels=8, mode=mode, task_type="CAUSAL_LM")


def spiel_config(mode):
    return SpIELConfig(num_tunable_weights=800, mode=mode, task_type="CAUSAL_LM")


def model():
    return tiny_model("llama", torch.float32)


def deltas(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "s2ft" in n])


def words():
    """A tokenizer over the 48 tokens of the tiny models: t3 t4 t5 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 48)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(row):
    return " ".join(f"t{max(3, int(token))}" for token in row)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", (False, True), ids=("fp32", "bf16+checkpointing"))
@pytest.mark.parametrize("mode", MODES)
def test_trainer_resumes_to_the_same_end(mode, bf16, tmp_path):
    ids = token_ids(batch=16)
    rows = [dict(input_ids=row, labels=row) for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        bf16=bf16,
        gradient_checkpointing=bf16,
        **COMMON,
    )
    whole = get_peft_model(model(), config(mode))
    before = whole(input_ids=ids, labels=ids).loss
    Trainer(whole, arguments, train_dataset=rows).train()
    after = whole(input_ids=ids, labels=ids).loss
    assert after < before - 0.01

    resumed = get_peft_model(model(), config(mode))
    trainer = Trainer(resumed, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(deltas(resumed), deltas(whole))
    assert torch.equal(resumed(ids).logits, whole(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_trl_sft(mode, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [text(row) for row in token_ids(batch=16)]})
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        max_length=16,
        bf16=False,
        **COMMON,
    )
    trainer = trl.SFTTrainer(
        model(), arguments, train_dataset=rows, processing_class=words(), peft_config=config(mode)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert deltas(trainer.model).abs().max() > 1e-3
    assert all(torch.isfinite(torch.tensor(losses)))


def dpo(folder, ids):
    """Arguments of a short training and its rows."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.DPOConfig(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=16,
        bf16=False,
        logging_steps=1,
        **COMMON,
    )
    rows = {
        "prompt": [text(row[:4]) for row in ids],
        "chosen": [" " + text(row[4:]) for row in ids],
        "rejected": [" " + text(row.flip(0)[:5]) for row in ids],
    }
    return arguments, datasets.Dataset.from_dict(rows)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_trl_dpo_measures_against_the_exact_base(mode, tmp_path):
    """The reference of DPO is the model with its adapter disabled: its log-probabilities are those
    of the base, in the first step and after training.
    """
    trl = pytest.importorskip("trl")
    ids = token_ids(batch=12)
    arguments, rows = dpo(tmp_path, ids)
    base = model()
    want = base(ids).logits
    trainer = trl.DPOTrainer(
        base, args=arguments, train_dataset=rows, processing_class=words(), peft_config=config(mode)
    )
    passes = []

    def record(module, args, kwargs, output):
        if any(
            layer.disable_adapters for layer in module.modules() if isinstance(layer, S2FTLinear)
        ):
            given = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
            passes.append((given, output.last_hidden_state.detach()))

    hook = trainer.model.base_model.model.model.register_forward_hook(record, with_kwargs=True)
    trainer.train()
    hook.remove()
    assert len(passes) == 4
    plain = model().model
    for given, states in passes:
        assert torch.allclose(plain(**given).last_hidden_state, states, rtol=0, atol=1e-5)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3  # policy and reference are the same at the start
    assert losses[-1] < losses[0]
    with trainer.model.disable_adapter():
        assert torch.allclose(trainer.model(ids).logits, want, rtol=0, atol=1e-5)
    assert not torch.allclose(trainer.model(ids).logits, want, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", (config, spiel_config), ids=("S2FT", "SpIEL"))
@pytest.mark.parametrize("mode", MODES)
def test_trl_dpo_of_a_trained_adapter_measures_against_that_adapter(method, mode, tmp_path):
    """TRL adds an adapter "ref" for it. The entries that SpIEL trains are not those drawn at first,
    which "ref" would have otherwise.
    """
    trl = pytest.importorskip("trl")
    ids = token_ids(batch=12)
    trained = get_peft_model(model(), method(mode))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, delta in trained.named_parameters():
            if "_delta" in name:
                delta.copy_(torch.randn(delta.shape, generator=generator) * 0.3)
        for layer in trained.modules():
            if isinstance(layer, SpIELLinear):
                index = layer.spiel_index["default"]
                index.copy_((layer.weight.numel() - 1 - index).flip(0))
    want = trained(ids).logits.detach()
    assert not torch.allclose(want, model()(ids).logits, rtol=0, atol=1e-1)
    trained.save_pretrained(tmp_path / "sft")

    policy = PeftModel.from_pretrained(model(), tmp_path / "sft", is_trainable=True)
    arguments, rows = dpo(tmp_path, ids)
    trainer = trl.DPOTrainer(policy, args=arguments, train_dataset=rows, processing_class=words())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3  # policy and reference are the same at the start
    assert losses[-1] < losses[0]
    assert not torch.allclose(policy(ids).logits, want, rtol=0, atol=1e-2)
    policy.set_adapter("ref")
    assert torch.allclose(policy(ids).logits, want, rtol=0, atol=1e-5)
