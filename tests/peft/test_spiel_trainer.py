"""SpIEL in transformers' Trainer."""

import shutil

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

from s2kernels.peft import SpIELCallback, SpIELConfig, make_optimizer

AG, MA = "accumulated_gradient", "momentum_approximation"
IDS = token_ids(batch=16)


def model_and_trainer(
    folder, selection, callback=None, bf16=False, optimizers=True, learning_rate=1.0, **fields
):
    config = SpIELConfig(
        num_tunable_weights=800,
        selection=selection,
        reselection_steps=4,
        accumulation_steps=2,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model("llama", torch.float32), config)
    arguments = TrainingArguments(
        str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        bf16=bf16,
        gradient_checkpointing=bf16,
        learning_rate=learning_rate,  # of no effect where the optimizer is given
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **dict(save_steps=5) | fields,
    )
    optimizer = make_optimizer(model, lr=1e-2 if selection == AG else 3e-2) if optimizers else None
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[dict(input_ids=row, labels=row) for row in IDS],
        optimizers=(optimizer, None),
        callbacks=[callback or SpIELCallback()],
    )
    return model, trainer


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "spiel" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "bf16"), [(AG, False), (AG, True), (MA, False)], ids=("AG", "AG-bf16", "MA")
)
def test_trainer_resumes_in_the_middle_of_a_window(selection, bf16, tmp_path):
    """Step 5 is the second of the window that begins with step 4."""
    model, trainer = model_and_trainer(tmp_path, selection, bf16=bf16)
    started = state(model)
    before = model(input_ids=IDS, labels=IDS).loss
    trainer.train()
    assert model(input_ids=IDS, labels=IDS).loss < before - 0.05
    want = state(model)
    assert all(not torch.equal(want[name], started[name]) for name in want if "spiel_index" in name)
    assert not any(m.observers for m in model.modules() if hasattr(m, "observers"))

    resumed, trainer = model_and_trainer(tmp_path, selection, bf16=bf16)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    got = state(resumed)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_optimizer_that_a_trainer_makes_itself(tmp_path):
    """torch's AdamW, fused: entries are replaced, and the model learns."""
    model, trainer = model_and_trainer(tmp_path, AG, optimizers=False, learning_rate=1e-2)
    started = state(model)
    before = model(input_ids=IDS, labels=IDS).loss
    trainer.train()
    assert model(input_ids=IDS, labels=IDS).loss < before - 0.05
    got = state(model)
    assert all(not torch.equal(got[name], started[name]) for name in got if "spiel_index" in name)


@pytest.mark.slow
def test_a_checkpoint_elsewhere_is_named_to_the_callback(tmp_path):
    model, trainer = model_and_trainer(tmp_path / "a", AG)
    trainer.train()
    shutil.move(tmp_path / "a" / "checkpoint-5", tmp_path / "moved")
    moved = str(tmp_path / "moved")
    _, trainer = model_and_trainer(tmp_path / "b", AG)
    with pytest.raises(ValueError, match=r"checkpoint-5 .*resume_from"):
        trainer.train(resume_from_checkpoint=moved)
    resumed, trainer = model_and_trainer(tmp_path / "b", AG, SpIELCallback(resume_from=moved))
    trainer.train(resume_from_checkpoint=moved)
    want, got = state(model), state(resumed)
    assert all(torch.equal(got[name], want[name]) for name in want)
    wrong = SpIELCallback(resume_from=tmp_path / "a" / "checkpoint-10")
    _, trainer = model_and_trainer(tmp_path / "b", AG, wrong)
    with pytest.raises(ValueError, match="resumes at step 5, but .*checkpoint-10 is of step 10"):
        trainer.train(resume_from_checkpoint=moved)
