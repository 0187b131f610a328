"""`s2kernels finetune`: from files of examples to an adapter, by a trainer of TRL."""

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import trl
import yaml
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, ProgressCallback

from s2kernels import peft as tuners
from s2kernels.adapter import read_files
from s2kernels.cli import examples, models, runs, training
from s2kernels.cli.answers import answers, check_chat, encode, prompt_of, show
from s2kernels.cli.figures import draw_losses
from s2kernels.files import replacing
from s2kernels.peft.host.saving import gathered_state

MOST_HELD_OUT = 128  # examples, where --held-out was not given


def finetune(args: Namespace) -> Callable[[], None]:
    """Everything but the training, which is returned, in the order that finds mistakes soonest.

    Raises ValueError or OSError for what does not fit; nothing is written before the training.
    """
    runs.settle(args)
    training.without_bars()
    checkpoint = runs.last_checkpoint(args.output) if args.resume else None
    if not args.resume:
        runs.check_new(args.output)
    elif checkpoint is None:
        raise ValueError(f"--resume: there is no checkpoint in {args.output}: leave it out")
    models.device_of(args.device)  # raises where it is not there
    if args.method == "spiel" and args.optimizer != "adamw_torch":
        raise ValueError("--optimizer: SpIEL has one of its own")
    if args.prompt and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("--prompt: one process answers, and FSDP has given it a part of the model")
    config = _adapter_config(args)
    sources = {"data": examples.sources_of(args.data)}
    if args.selection is not None:
        units, sources["selection"] = read_selection(args.selection), [args.selection]
    settings = runs.settings_of(args, sources)
    if checkpoint:
        runs.check_same(args.output, settings)
        read_files(checkpoint)  # raises for a damaged one, which the Trainer would load
    records, kind, num_empty = examples.read(args.data, args.strict)
    if kind == "preference" and args.packing:
        raise ValueError("--packing: preferences cannot be packed")
    share = min(MOST_HELD_OUT / len(records), 0.05) if args.held_out is None else args.held_out
    parts = examples.split(records, share, args.seed)
    tokenizer = models.load_tokenizer(args.tokenizer or args.model)
    if kind in examples.CHATS or isinstance(records[0].get("chosen"), list):
        check_chat(tokenizer)
    prompts = [encode(tokenizer, prompt_of(x, args.template, tokenizer)) for x in args.prompt]

    model = _load(args)
    num = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {num}: --tokenizer")
    length = models.length_of(model, args.max_length)
    (pairs, rows), (held, held_out) = (
        training.prepared(part, kind, tokenizer, args.template, length) for part in parts
    )
    if args.selection is not None:
        config.indices = tuners.indices_of(model, config, units)
    elif args.method == "s2ft" and checkpoint is not None:
        config.indices = read_files(checkpoint)[0].get("indices")  # as they were chosen at first
    elif args.method == "s2ft" and args.strategy != "random":
        sample = rows.shuffle(args.seed).select(range(math.ceil(0.01 * len(rows))))
        if kind == "preference":
            sample = sample.rename_column("chosen", "completion").remove_columns("rejected")
            sample = training.tokenized(tokenizer, sample, length)
        model.to(training.local_device(args.device))
        config = tuners.select_indices(model, config, training.batches(sample, tokenizer))
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
        training.check_packing(trainer.model)
    is_main = trainer.is_world_process_zero()
    num, num_cut = len(records) + num_empty, len(pairs) + len(held) - len(rows) - len(held_out)
    left_out = num_empty + num_cut
    counts = {"examples": num, "held_out_examples": len(parts[1]), "examples_left_out": left_out}
    if left_out and is_main:
        why = f"{num_empty} have an empty field, {num_cut} no output within {length} tokens"
        print(f"note: {left_out} of {num} examples are left out: {why}")

    def work() -> None:
        if is_main and checkpoint is None:
            with replacing(args.output) as folder:
                text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
                (folder / runs.SETTINGS_NAME).write_text(text, "utf-8")
        metrics = {**counts, **_train(trainer, args.output, checkpoint), "options": settings}
        state = gathered_state(trainer.model)  # of all processes, under FSDP2
        if not is_main:
            return
        with replacing(args.output) as folder:
            tuners.save_pretrained(trainer.model, folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
        with replacing(args.output) as folder:  # if it fails, the adapter is there
            draw_losses(metrics, folder / "loss.svg")
        for prompt, ids in zip(args.prompt, prompts, strict=True):
            found = {}
            for name, context in (("before", model.disable_adapter), ("after", nullcontext)):
                with context():
                    made = answers(model.eval().generate, tokenizer, [ids], model.device, 64)
                found[name] = made[0]
            show(prompt, found)
        if curve := metrics["held_out_loss"]:
            (_, first), (step, last) = curve[0], curve[-1]
            print(f"held-out loss {first:.4f} -> {last:.4f} in {step} steps")
        print(f"{metrics['trained_parameters']:,} parameters trained; adapter in {args.output}")

    return work


def _train(trainer: Any, output: Path, checkpoint: Path | None) -> dict[str, Any]:
    """What is measured of the training, with the held-out loss in the end."""
    begin = perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        found = runs.last_checkpoint(output)
        text = f"--resume goes on from {found.name}" if found else "no checkpoint yet; begin anew"
        raise KeyboardInterrupt(f"interrupted: {text}") from None
    seconds, state = perf_counter() - begin, trainer.state
    last = [entry["step"] for entry in state.log_history if "eval_loss" in entry][-1:]
    if trainer.eval_dataset is not None and last != [state.global_step]:
        trainer.evaluate()
    curves: dict[str, list] = {"loss": [], "eval_loss": []}
    for name, curve in curves.items():
        for entry in state.log_history:
            if name in entry:  # JSON has no word for what is not finite
                value = entry[name] if math.isfinite(entry[name]) else None
                curve.append((entry["step"], value))
    return {
        "steps": state.global_step,
        "trained_parameters": trainer.model.num_parameters(only_trainable=True),
        "loss": curves["loss"],
        "held_out_loss": curves["eval_loss"],
        "seconds": round(seconds, 3),  # since it was last resumed
    }


def _load(args: Namespace) -> Any:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    fields: dict[str, Any] = {}
    quantized = args.load_in_4bit or args.load_in_8bit
    if quantized:
        fields = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=args.load_in_4bit,
                load_in_8bit=args.load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
            ),
            "device_map": {"": training.local_device(args.device)},
        }
    model = models.load_model(args.model, dtype, **fields)
    model.config.use_cache = False  # with a cache, packed examples would see each other
    if quantized:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # On a CPU bitsandbytes packs the weights for inference at the first evaluation, and
            # what it computes of them in training is wrong from then on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def _adapter_config(args: Namespace) -> Any:
    targets = args.targets or (None if args.method == "s2ft" else "all-linear")
    common: dict[str, Any] = dict(task_type="CAUSAL_LM", target_modules=targets)
    if args.method == "lora":
        return LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common)
    common |= dict(seed=args.seed, mode=args.mode)
    if args.method == "spiel":
        return tuners.SpIELConfig(density=args.density, **common)
    if args.selection is None:
        names = ("heads", "channels", "granularity", "scope")
        common |= {name: getattr(args, name) for name in names}
        common |= dict(selection=args.strategy, largest=not args.smallest)
    return tuners.S2FTConfig(layout=args.layout, **common)


def read_selection(path: Path) -> dict[str, torch.Tensor]:
    """The units in a file of `s2kernels select`, by structure; ValueError for another file."""
    try:
        units = json.loads(path.read_text("utf-8"))["units"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no selection of s2kernels select: {error!r}") from None
    for name, chosen in units:
        numbers = chosen if isinstance(chosen, list) else [None]
        if not all(type(unit) is int and 0 <= unit < 2**31 for unit in numbers):
            raise ValueError(f"{path}: {name}: list of whole numbers wanted, got {chosen!r:.99}")
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
        logging_steps=1 / 200,  # a share of all steps, as is the next
        save_steps=args.save_steps or 1 / 10,
        save_total_limit=2,
        eval_strategy="steps" if len(held_out) else "no",
        eval_on_start=bool(len(held_out)) and not args.resume,
        **dict(beta=args.beta) if prefers else dict(packing=args.packing, eval_packing=False),
    )
    trainer: Any = (trl.DPOTrainer if prefers else training.Completions)(
        model,
        args=options,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=tokenizer,
    )
    trainer.create_model_card = lambda *_, **__: None  # PEFT writes one
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(training.Bar)
    if args.method == "spiel":
        trainer.optimizer = tuners.make_optimizer(model, args.lr, weight_decay=args.weight_decay)
        trainer.add_callback(tuners.SpIELCallback(resume_from=runs.last_checkpoint(args.output)))
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL makes it bf16 where the base is quantized
            parameter.data = parameter.data.float()
    per_step = args.batch_size * args.accumulate * options.world_size
    per_epoch = math.ceil(len(trainer.train_dataset) / per_step)
    steps = args.max_steps or math.ceil(args.epochs * per_epoch)
    # An evaluation takes no longer than a third of the training since the one before.
    options.eval_steps = max(math.ceil(steps / 4), math.ceil(len(held_out) / per_step))
    return trainer
