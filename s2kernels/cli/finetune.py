"""The training job of `s2kernels finetune`: from a file of examples to an adapter.

`prepare` looks at all that the user gave and raises ValueError or OSError for what does
not fit; `Job.run` trains, with the Trainer of transformers, and writes.
"""

import json
import math
import random
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from peft import get_peft_model
from transformers import ProgressCallback, Trainer, TrainingArguments

from s2kernels.adapter import read_files
from s2kernels.cli.examples import IGNORED, Example, collate, encode, pack, read_records
from s2kernels.cli.figures import draw_losses
from s2kernels.cli.models import load_model, load_tokenizer, random_model
from s2kernels.cli.runs import BASE_NAME, OPTIONS_NAME, check_same, last_checkpoint, options_of
from s2kernels.files import replacing
from s2kernels.peft import S2FTConfig, indices_of, save_pretrained, select_indices


class _Trainer(Trainer):
    """Trainer whose held-out loss is the mean over tokens, not over batches."""

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        loader = self.get_eval_dataloader(eval_dataset)
        model: Any = self.model
        model.eval()
        total = tokens = 0.0
        for batch in loader:
            batch = self._prepare_inputs(batch)
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                total += float(model(**batch).loss) * count
            tokens += count
        sums = self.accelerator.reduce(
            torch.tensor([total, tokens], device=self.args.device), "sum"
        )
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _Bar(ProgressCallback):
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


@dataclass
class Job:
    """A run of which everything is known to fit."""

    args: Namespace
    options: dict[str, Any]
    model: Any
    tokenizer: Any
    trainer: Trainer
    counts: dict[str, int]
    checkpoint: Path | None

    def run(self) -> dict[str, Any]:
        """Train, and write all files into the output folder. Returns the metrics."""
        output = self.args.output
        main = self.trainer.is_world_process_zero()
        if main and self.checkpoint is None:
            with replacing(output) as folder:
                _write_json(folder / OPTIONS_NAME, self.options)
            if self.args.config is not None:
                base = random_model(self.args.config, self.model.dtype, self.args.seed)
                with replacing(output / BASE_NAME) as folder:
                    base.save_pretrained(folder)
                    self.tokenizer.save_pretrained(folder)
        begin = perf_counter()
        resume = None if self.checkpoint is None else str(self.checkpoint)
        self.trainer.train(resume_from_checkpoint=resume)
        seconds = perf_counter() - begin
        history, step = self.trainer.state.log_history, self.trainer.state.global_step
        evaluated = any("eval_loss" in entry and entry["step"] == step for entry in history)
        if self.trainer.eval_dataset is not None and not evaluated:
            self.trainer.evaluate()

        metrics = {
            "steps": step,
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            **self.counts,
            "loss": _curve(self.trainer.state.log_history, "loss"),
            "held_out_loss": _curve(self.trainer.state.log_history, "eval_loss"),
            "seconds": round(seconds, 3),  # since it was last resumed
            "options": self.options,
        }
        if main:
            self._write(metrics)
        return metrics

    def _write(self, metrics: dict[str, Any]) -> None:
        with replacing(self.args.output) as folder:
            save_pretrained(self.model, folder)
            self.tokenizer.save_pretrained(folder)
            _write_json(folder / "metrics.json", metrics)
        with replacing(self.args.output) as folder:  # if it fails, the adapter is there
            draw_losses(metrics, folder / "loss.svg")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def prepare(args: Namespace) -> Job:
    """Everything but the training, in the order that finds mistakes soonest; writes nothing.

    Raises ValueError or OSError for what does not fit.
    """
    checkpoint = None
    if args.resume:
        checkpoint = last_checkpoint(args.output)
        if checkpoint is None:
            raise ValueError(f"--resume: there is no checkpoint in {args.output}: leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if args.strategy == "random" and args.smallest:
        raise ValueError("--smallest ranks by scores: it needs a --strategy other than random")
    records = read_records(args.data)
    options = options_of(args)
    if checkpoint:
        check_same(args.output, options)

    base = args.output / BASE_NAME if args.config else args.model
    tokenizer = load_tokenizer(args.tokenizer or str(base))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if args.config:
        model = random_model(args.config, dtype, args.seed)
        model.name_or_path = str(base)
    else:
        model = load_model(base, dtype)
    model.config.use_cache = False  # with a cache, packed examples would see each other
    num = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {num}: --tokenizer")
    limit = getattr(model.config, "max_position_embeddings", None) or args.max_length or 512
    length = args.max_length or min(512, limit)
    if length > limit:
        raise ValueError(f"--max-length {length}: the model has {limit} positions")

    parts = split(records, args.held_out, args.seed)
    encoded = [[encode(record, tokenizer, length) for record in part] for part in parts]
    left_out = sum(not examples for part in encoded for examples in part)
    rows, held_out = ([example for examples in part for example in examples] for part in encoded)
    if not rows or (parts[1] and not held_out):
        raise ValueError(f"--max-length {length} leaves no token of any output to train on")
    counts = {
        "examples": len(records),
        "held_out_examples": len(parts[1]),
        "examples_left_out": left_out,
        "tokens": sum(len(example["input_ids"]) for example in rows),
    }
    if left_out:
        print(f"note: {left_out} of {len(records)} examples have no output within {length} tokens")

    choice: dict[str, Any] = {}
    if args.selection is None:
        choice = dict(
            heads=args.heads,
            channels=args.channels,
            granularity=args.granularity,
            selection=args.strategy,
            largest=not args.smallest,
            scope=args.scope,
        )
    # the Trainer would load one that is damaged
    before = {} if checkpoint is None else read_files(checkpoint)[0]
    config = S2FTConfig(
        task_type="CAUSAL_LM",
        target_modules=args.targets,
        seed=args.seed,
        mode=args.mode,
        layout=args.layout,
        **choice,
    )
    if args.selection is not None:
        config.indices = indices_of(model, config, read_selection(args.selection))
    elif checkpoint is not None:
        config.indices = before.get("indices")  # as they were chosen at first
    elif args.strategy != "random":
        _to_device(model, args.device)
        sample = calibration_set(encoded[0], args.calibration_share, args.seed)
        batches = [collate([example], tokenizer.pad_token_id or 0) for example in sample]
        config = select_indices(model, config, batches)
    try:
        model = get_peft_model(model, config)
    except TypeError as error:  # of a target that is not a linear layer
        raise ValueError(str(error)) from error
    if args.packing:
        rows, held_out = pack(rows, length), pack(held_out, length)
        check_packing(model, rows)
    trainer = _Trainer(
        model,
        _arguments(args, len(rows)),
        data_collator=partial(collate, pad=tokenizer.pad_token_id or 0),
        train_dataset=cast(Any, rows),
        eval_dataset=cast(Any, held_out or None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    return Job(args, options, model, tokenizer, trainer, counts, checkpoint)


def calibration_set(records: list[list[Example]], share: float, seed: int) -> list[Example]:
    """The examples of a share of the training records, drawn by `seed`; of at least one of them."""
    usable = [examples for examples in records if examples]
    num = max(1, math.floor(share * len(usable) + 0.5))
    drawn = sorted(random.Random(seed).sample(range(len(usable)), num))
    return [example for i in drawn for example in usable[i]]


def _to_device(model: torch.nn.Module, device: str) -> None:
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        model.to("cuda")


def check_packing(model: Any, rows: list[Example]) -> None:
    """Raises ValueError where an example in a row changes with the one before it: a model may not
    look at positions, and would then attend across.
    """
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        if len(starts) > 1:
            break
    else:
        return
    batch = {name: tensor.to(model.device) for name, tensor in collate([row]).items()}
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, : starts[1]] = batch["input_ids"][:, starts[1] :].max()
    training = model.training
    model.eval()
    with torch.no_grad():
        left, right = (model(**inputs).logits[:, starts[1] :] for inputs in (batch, other))
    model.train(training)
    if (left - right).abs().max() > 1e-3 * left.abs().max():
        raise ValueError(
            f"--packing: {model.config.model_type} does not keep packed examples apart"
        )


def read_selection(path: Path) -> dict[str, torch.Tensor]:
    """The units in a file of `s2kernels select`, by structure; ValueError for another file."""
    try:
        units = json.loads(path.read_text("utf-8"))["units"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no selection of s2kernels select: {error!r}") from None
    for name, chosen in units:
        if not isinstance(chosen, list) or not all(
            type(unit) is int and 0 <= unit < 2**31 for unit in chosen
        ):
            raise ValueError(
                f"{path}: units of {name} must be a list of whole numbers of 32 bits, got "
                f"{chosen!r:.100}"
            )
    return {name: torch.tensor(chosen, dtype=torch.int32) for name, chosen in units}


def split(records: list, share: float, seed: int) -> tuple[list, list]:
    """Training and held-out records, in their order; the latter drawn by `seed`."""
    num = math.floor(share * len(records) + 0.5) if share else 0
    num = max(num, 1) if share else 0
    if num >= len(records):
        raise ValueError(f"--held-out {share} leaves none of {len(records)} examples to train on")
    drawn = set(random.Random(seed).sample(range(len(records)), num))
    train = [record for i, record in enumerate(records) if i not in drawn]
    return train, [record for i, record in enumerate(records) if i in drawn]


def _arguments(args: Namespace, num_rows: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.lr,
        warmup_steps=args.warmup,
        lr_scheduler_type="linear",
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=args.device == "cpu",
        seed=args.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        eval_strategy="steps" if args.held_out else "no",
        eval_on_start=bool(args.held_out) and not args.resume,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel, which S2FT does not go with
    per_step = args.batch_size * args.accumulate * arguments.world_size
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(num_rows / per_step))
    arguments.logging_steps = max(1, steps // 200)
    arguments.eval_steps = max(1, math.ceil(steps / 4))
    arguments.save_steps = args.save_steps or max(1, math.ceil(steps / 10))
    return arguments


def _curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float | None]]:
    """(step, value); None where the value is not finite, for which JSON has no word."""
    values = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [(step, value if math.isfinite(value) else None) for step, value in values]
