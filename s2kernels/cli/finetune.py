"""The training job of `s2kernels finetune`: from files of examples to an adapter.

`prepare` looks at all that the user gave and raises ValueError or OSError for what does not fit;
`Job.run` trains, with a trainer of TRL, and writes.
"""

import json
import math
import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import torch
import trl
import yaml
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, ProgressCallback

from s2kernels.adapter import read_files
from s2kernels.cli import training
from s2kernels.cli.answers import answers, check_chat, encode, prompt_of
from s2kernels.cli.examples import for_trainer, read, sources_of, split
from s2kernels.cli.figures import draw_losses
from s2kernels.cli.models import device_of, length_of, load_model, load_tokenizer, random_model
from s2kernels.cli.runs import BASE_NAME, SETTINGS_NAME, check_same, last_checkpoint, settings_of
from s2kernels.files import replacing
from s2kernels.peft import (
    S2FTConfig,
    SpIELCallback,
    SpIELConfig,
    indices_of,
    save_pretrained,
    select_indices,
)
from s2kernels.peft.host.saving import gathered_state

MOST_HELD_OUT = 128  # examples, where --held-out was not given


@dataclass
class Job:
    """A run of which everything is known to fit."""

    args: Namespace
    settings: dict[str, Any]
    trainer: Any
    tokenizer: Any
    counts: dict[str, int]
    checkpoint: Path | None

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.trainer.is_world_process_zero()

    def run(self) -> dict[str, Any]:
        """Train, and write all files into the output folder. Returns the metrics."""
        output, trainer = self.args.output, self.trainer
        if self.is_main and self.checkpoint is None:
            with replacing(output) as folder:
                text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
                (folder / SETTINGS_NAME).write_text(text, "utf-8")
            if self.args.model_config is not None:
                dtype = trainer.model.dtype
                base = random_model(self.args.model_config, dtype, self.args.seed)
                with replacing(output / BASE_NAME) as folder:
                    base.save_pretrained(folder)
                    self.tokenizer.save_pretrained(folder)
        begin = perf_counter()
        resume = None if self.checkpoint is None else str(self.checkpoint)
        trainer.train(resume_from_checkpoint=resume)
        seconds = perf_counter() - begin
        history, step = trainer.state.log_history, trainer.state.global_step
        evaluated = any("eval_loss" in entry and entry["step"] == step for entry in history)
        if trainer.eval_dataset is not None and not evaluated:
            trainer.evaluate()

        metrics = {
            "steps": step,
            "trained_parameters": trainer.model.num_parameters(only_trainable=True),
            **self.counts,
            "loss": _curve(trainer.state.log_history, "loss"),
            "held_out_loss": _curve(trainer.state.log_history, "eval_loss"),
            "seconds": round(seconds, 3),  # since it was last resumed
        }
        state = gathered_state(trainer.model)  # of all processes, where FSDP2 has sharded the model
        if self.is_main:
            self._write(metrics, state)
        return metrics

    def _write(self, metrics: dict[str, Any], state: dict[str, torch.Tensor] | None) -> None:
        with replacing(self.args.output) as folder:
            save_pretrained(self.trainer.model, folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
            text = json.dumps(metrics | {"options": self.settings}, indent=1)
            (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        with replacing(self.args.output) as folder:  # if it fails, the adapter is there
            draw_losses(metrics, folder / "loss.svg")

    def answers(self, prompt: str) -> dict[str, str]:
        """What the model answers to an instruction, before the training and after."""
        model, args = self.trainer.model.eval(), self.args
        ids = [encode(self.tokenizer, prompt_of(prompt, args.template, self.tokenizer))]
        with model.disable_adapter():
            (before,) = answers(model.generate, self.tokenizer, ids, model.device, 64)
        (after,) = answers(model.generate, self.tokenizer, ids, model.device, 64)
        return {"before": before, "after": after}


def prepare(args: Namespace) -> Job:
    """Everything but the training, in the order that finds mistakes soonest; writes nothing.

    Raises ValueError or OSError for what does not fit.
    """
    training.without_bars()
    checkpoint = None
    if args.resume:
        checkpoint = last_checkpoint(args.output)
        if checkpoint is None:
            raise ValueError(f"--resume: there is no checkpoint in {args.output}: leave it out")
    device_of(args.device)  # raises where it is not there
    if args.strategy == "random" and args.smallest:
        raise ValueError("--smallest ranks by scores: it needs a --strategy other than random")
    if args.method == "spiel" and args.optimizer != "adamw_torch":
        raise ValueError("--optimizer: SpIEL has one of its own")
    chosen = {} if args.selection is None else {"selection": [args.selection]}
    settings = settings_of(args, {"data": sources_of(args.data), **chosen})
    if checkpoint:
        check_same(args.output, settings)
    records, kind, left_out = read(args.data, args.strict)
    if kind == "preference" and args.packing:
        raise ValueError("--packing: preferences cannot be packed")
    share = min(MOST_HELD_OUT / len(records), 0.05) if args.held_out is None else args.held_out
    parts = split(records, share, args.seed)
    base = args.output / BASE_NAME if args.model_config is not None else args.model
    tokenizer = load_tokenizer(args.tokenizer or str(base))
    if kind in ("messages", "conversations") or isinstance(records[0].get("chosen"), list):
        check_chat(tokenizer)
    for prompt in args.prompt:
        prompt_of(prompt, args.template, tokenizer)

    model = _load(args, base)
    num = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {num}: --tokenizer")
    length = length_of(model, args.max_length)
    rows, held_out = (for_trainer(part, kind, tokenizer, args.template, length) for part in parts)
    empty = left_out
    if kind != "preference":
        before = len(rows) + len(held_out)
        rows = training.tokenized(tokenizer, rows, length)
        if len(held_out):
            held_out = training.tokenized(tokenizer, held_out, length)
        left_out += before - len(rows) - len(held_out)
    if not len(rows) or (len(parts[1]) and not len(held_out)):
        raise ValueError(f"--max-length {length} leaves no token of any output to train on")

    if checkpoint is not None:  # the Trainer would load one that is damaged
        read_files(checkpoint)
    config = _adapter_config(args, model, checkpoint)
    if checkpoint is None and args.method == "s2ft" and args.strategy not in (None, "random"):
        sample = rows
        if kind == "preference":
            sample = rows.rename_column("chosen", "completion").remove_columns("rejected")
            sample = training.tokenized(tokenizer, sample, length)
        sample = calibration_set(sample, args.calibration_share, args.seed)
        model.to(training.local_device(args.device))
        config = select_indices(model, config, training.batches(sample, tokenizer))
    try:
        model = get_peft_model(model, config)
    except TypeError as error:  # of a target that is not a linear layer
        raise ValueError(str(error)) from error
    if args.gradient_checkpointing:
        # By the trainers' argument a gradient of the embedding would be asked for.
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    trainer = _trainer(args, model, tokenizer, kind, length, rows, held_out)
    if args.packing:
        training.check_packing(trainer)
    counts = {
        "examples": len(records) + empty,
        "held_out_examples": len(parts[1]),
        "examples_left_out": left_out,
    }
    job = Job(args, settings, trainer, tokenizer, counts, checkpoint)
    if left_out and job.is_main:
        why = f"{empty} have an empty field, {left_out - empty} no output within {length} tokens"
        print(f"note: {left_out} of {len(records) + empty} examples are left out: {why}")
    return job


def _load(args: Namespace, base: Path | str) -> Any:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    fields: dict[str, Any] = {}
    bits = 4 if args.load_in_4bit else 8 if args.load_in_8bit else None
    if bits:
        fields = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=bits == 4,
                load_in_8bit=bits == 8,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
            ),
            "device_map": {"": training.local_device(args.device)},
        }
    if args.model_config is not None:
        if bits:
            raise ValueError(f"--load-in-{bits}bit goes with --model")
        model = random_model(args.model_config, dtype, args.seed)
        model.name_or_path = str(base)
    else:
        model = load_model(base, dtype, **fields)
    model.config.use_cache = False  # with a cache, packed examples would see each other
    if bits:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # On a CPU bitsandbytes packs the weights for inference at the first evaluation, and
            # what it computes of them in training is wrong from then on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def _adapter_config(args: Namespace, model: Any, checkpoint: Path | None) -> Any:
    common: dict[str, Any] = dict(task_type="CAUSAL_LM", target_modules=args.targets)
    if args.method == "lora":
        common["target_modules"] = args.targets or "all-linear"
        return LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common)
    common |= dict(seed=args.seed, mode=args.mode)
    if args.method == "spiel":
        common["target_modules"] = args.targets or "all-linear"
        return SpIELConfig(density=args.density, **common)
    if args.selection is not None:
        config = S2FTConfig(layout=args.layout, **common)
        config.indices = indices_of(model, config, read_selection(args.selection))
        return config
    config = S2FTConfig(
        heads=args.heads,
        channels=args.channels,
        granularity=args.granularity,
        selection=args.strategy,
        largest=not args.smallest,
        scope=args.scope,
        layout=args.layout,
        **common,
    )
    if checkpoint is not None:
        config.indices = read_files(checkpoint)[0].get("indices")  # as they were chosen at first
    return config


def calibration_set(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """A share of the training examples, drawn by `seed`; at least one of them."""
    num = max(1, math.floor(share * len(rows) + 0.5))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), num)))


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


def _trainer(
    args: Namespace, model: Any, tokenizer: Any, kind: str, length: int, rows: Any, held_out: Any
) -> Any:
    prefers = kind == "preference"
    options = training.arguments(
        str(args.output),
        args.device,
        trl.DPOConfig if prefers else trl.SFTConfig,
        max_length=length,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup,
        lr_scheduler_type=args.scheduler,
        optim=args.optimizer,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        seed=args.seed,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        eval_strategy="steps" if len(held_out) else "no",
        eval_on_start=bool(len(held_out)) and not args.resume,
        **dict(beta=args.beta) if prefers else dict(packing=args.packing, eval_packing=False),
    )
    trainer: Any = (training.Preferences if prefers else training.Completions)(
        model,
        args=options,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(training.Bar)
    if args.method == "spiel":
        trainer.add_callback(SpIELCallback(resume_from=last_checkpoint(args.output)))
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL makes it bf16 where the base is quantized
            parameter.data = parameter.data.float()
    per_step = args.batch_size * args.accumulate * options.world_size
    per_epoch = math.ceil(len(trainer.train_dataset) / per_step)
    steps = args.max_steps or math.ceil(args.epochs * per_epoch)
    options.logging_steps = max(1, steps // 200)
    # An evaluation takes no longer than a third of the training since the one before.
    options.eval_steps = max(1, math.ceil(steps / 4), math.ceil(len(held_out) / per_step))
    options.save_steps = args.save_steps or max(1, math.ceil(steps / 10))
    return trainer


def _curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float | None]]:
    """(step, value); None where the value is not finite, for which JSON has no word."""
    values = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [(step, value if math.isfinite(value) else None) for step, value in values]
