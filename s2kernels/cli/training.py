"""TRL's trainers as the command line runs them, for `finetune`, `evaluate` and `select`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import datasets
import torch
import trl
from accelerate import PartialState
from torch import Tensor
from transformers import ProgressCallback
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s2kernels.cli.examples import for_trainer
from s2kernels.cli.models import device_of


def without_bars() -> None:
    """Leave the screen to the one bar that matters."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Bar(ProgressCallback):
    """The progress bar with the losses in it, instead of a line for each."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        last = {name: value for entry in state.log_history for name, value in entry.items()}
        names = {"loss": "loss", "eval_loss": "held-out"}
        shown = {title: f"{last[name]:.4f}" for name, title in names.items() if name in last}
        if self.training_bar is not None:
            self.training_bar.set_postfix(shown)


class Completions(trl.SFTTrainer):
    """SFTTrainer whose held-out loss is the mean over tokens, not over batches: of any number of
    processes, each example once.
    """

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        packing: Any = self.data_collator
        self.data_collator = replace(packing, padding_free=False)
        loader = self.get_eval_dataloader()
        self.data_collator = packing
        cast(Any, self.model).eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in map(self._prepare_inputs, loader):
            with torch.no_grad(), self.compute_loss_context_manager():
                out = self.model_wrapped(**batch, fused_lm_head=True)
            of_rows = torch.stack([-out.log_probs.float().sum(1), out.label_mask.sum(1)], 1)
            sums += self.accelerator.gather_for_metrics(of_rows).sum(0).double().cpu()
        found = {"eval_loss": float(sums[0] / sums[1])}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


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


def tokenized(tokenizer: Any, rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """`input_ids` and `labels` of examples; without those that have no label left."""
    # What SFTTrainer makes of them, without a model; an SFTConfig would settle the device of the
    # whole process.
    of_trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss="completion" in rows.column_names,
    )
    options: Any = SimpleNamespace(
        max_length=length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
    )
    prepare = trl.SFTTrainer._prepare_dataset
    found = prepare(of_trainer, rows, tokenizer, options, False, None, "data")
    return found.select_columns(["input_ids", "labels"])


def prepared(
    records: datasets.Dataset, kind: str, tokenizer: Any, template: str, length: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Records in the shape that a trainer takes, and, but for preferences, their tokens.

    Raises ValueError where no token of any record would be learnt.
    """
    pairs = for_trainer(records, kind, tokenizer, template, length)
    rows = pairs if kind == "preference" or not len(pairs) else tokenized(tokenizer, pairs, length)
    if len(records) and not len(rows):
        raise ValueError(f"--max-length {length} leaves no token of any output to train on")
    return pairs, rows


def batches(rows: datasets.Dataset, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Each example as a batch."""
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id or 0)
    return [collate([row]) for row in rows]


def check_packing(model: Any) -> None:
    """Raises ValueError where a packed example changes with the one before it: a model may not look
    at positions, and would then attend across.
    """
    ids = torch.arange(4, 12, device=model.device).view(1, 8)
    places = ids.new_tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    model.eval()
    with torch.no_grad():
        left, right = (
            model(input_ids=row, position_ids=places).logits[:, 4:]
            for row in (ids, torch.cat([ids[:, 4:], ids[:, 4:]], 1))
        )
    if (left - right).abs().max() > 1e-3 * left.abs().max():
        raise ValueError(
            f"--packing: {model.config.model_type} does not keep packed examples apart"
        )
