"""TRL's trainers as the command line runs them, for `finetune`, `evaluate` and `select`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import datasets
import torch
import trl
from accelerate import PartialState
from torch import Tensor
from transformers import ProgressCallback, Trainer
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s2kernels.cli.models import device_of
from s2kernels.peft import make_optimizer


def without_bars() -> None:
    """Leave the screen to the one bar that matters."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Bar(ProgressCallback):
    """The progress bar with the losses in it, instead of a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name, title in (("loss", "loss"), ("eval_loss", "held-out")):
            if name in (logs or {}):
                self.shown[title] = f"{logs[name]:.4f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class _Adapting(Trainer):
    """What both trainers do otherwise: SpIEL's optimizer, and no model card but the adapter's."""

    def create_optimizer(self, *args: Any) -> Any:
        model = cast(Any, self.model)
        if self.optimizer is None and model.active_peft_config.peft_type == "SPIEL":
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = make_optimizer(model, rate, weight_decay=decay)
        return super().create_optimizer(*args)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Nothing: PEFT writes the card."""


class Preferences(_Adapting, trl.DPOTrainer):
    pass


class Completions(_Adapting, trl.SFTTrainer):
    """SFTTrainer whose held-out loss is the mean over tokens, not over batches: of any number of
    processes, each example once.
    """

    def get_eval_dataloader(self, eval_dataset=None):
        packing = self.data_collator
        self.data_collator = replace(packing, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = packing

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        loader = self.get_eval_dataloader(eval_dataset)
        cast(Any, self.model).eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in loader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                out = self.model_wrapped(**batch, fused_lm_head=True)
            of_rows = torch.stack([-out.log_probs.float().sum(1), out.label_mask.sum(1)], 1)
            sums += self.accelerator.gather_for_metrics(of_rows).sum(0).double().cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def arguments(folder: str, device: str, kind: Any = trl.SFTConfig, **options: Any) -> Any:
    """The configuration of a trainer, without what TRL switches on by itself."""
    made = kind(
        output_dir=folder,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=device_of(device) == "cpu",  # said outright, else CPUs do not work together
        dataloader_pin_memory=device_of(device) == "cuda",
        report_to="none",
        **options,
    )
    made._n_gpu = min(made.n_gpu, 1)  # else DataParallel, which S2FT does not go with
    return made


def local_device(device: str) -> torch.device:
    """The device of this process."""
    return PartialState(cpu=device_of(device) == "cpu").device


class _Preparing(trl.SFTTrainer):
    """What SFTTrainer makes of examples, without a model."""

    def __init__(self, tokenizer: Any, completions: bool) -> None:
        self._tokenizer, self.chat_template = tokenizer, None
        self.completion_only_loss = completions


def tokenized(tokenizer: Any, rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """`input_ids` and `labels` of examples; without those that have no label left."""
    preparing: Any = _Preparing(tokenizer, "completion" in rows.column_names)
    # An SFTConfig would settle the device of the whole process.
    options = SimpleNamespace(
        max_length=length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
    )
    found = preparing._prepare_dataset(rows, tokenizer, options, False, None, "data")
    return found.select_columns(["input_ids", "labels"])


def batches(rows: datasets.Dataset, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Each example as a batch."""
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id or 0)
    return [collate([row]) for row in rows]


def check_packing(trainer: Any) -> None:
    """Raises ValueError where an example in a row changes with the one before it: a model may not
    look at positions, and would then attend across.
    """
    row = next((row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    model, first = trainer.model, row["seq_lengths"][0]
    batch = trainer._prepare_inputs(trainer.data_collator([row]))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :first] = batch["input_ids"][:, first:].max()
    training = model.training
    model.eval()
    with torch.no_grad():
        left, right = (model(**inputs).logits[:, first:] for inputs in (batch, other))
    model.train(training)
    if (left - right).abs().max() > 1e-3 * left.abs().max():
        kind = model.config.model_type
        raise ValueError(f"--packing: {kind} does not keep packed examples apart")
