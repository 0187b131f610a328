"""What the subcommands do; `s2kernels.cli` says how they are called.

Each takes the parsed arguments and raises ValueError or OSError for what does not fit, before it
writes. What takes long is imported where it is used.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s2kernels.cli.runs import check_new, last_checkpoint, settle


def finetune(args: Namespace) -> Callable[[], None]:
    """Everything but the training, which is returned."""
    if not args.resume:
        check_new(args.output)
    settle(args)
    from s2kernels.cli.answers import show
    from s2kernels.cli.finetune import prepare

    job = prepare(args)

    def work() -> None:
        try:
            metrics = job.run()
        except KeyboardInterrupt:
            found = last_checkpoint(args.output)
            line = "interrupted before the first checkpoint; begin anew"
            if found is not None:
                line = f"interrupted; --resume goes on from {found.name}"
            args.parser.exit(130, line + "\n")
        if not job.is_main:
            return
        for prompt in args.prompt:
            show(prompt, job.answers(prompt))
        if metrics["held_out_loss"]:
            (_, first), (step, last) = metrics["held_out_loss"][0], metrics["held_out_loss"][-1]
            print(f"held-out loss {first:.4f} -> {last:.4f} in {step} steps")
        print(f"{metrics['trained_parameters']:,} parameters trained; adapter in {args.output}")

    return work


def evaluate(args: Namespace) -> None:
    """Print what an adapter has learnt, beside its base."""
    from s2kernels.cli.evaluate import evaluate

    found = evaluate(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['examples']} examples, {found['tokens']:,} tokens learnt of them")
    for name in ("base", "adapter"):
        line = f"{name:9}loss per token {found[name]['loss']:.4f}"
        if "right" in found[name]:
            line += f"   right answers {found[name]['right']} of {found['examples']}"
        print(line)


def generate(args: Namespace) -> Callable[[], None]:
    """Everything but the generation, which is returned."""
    from s2kernels.cli import serving

    return serving.generate(args)


def serve(args: Namespace) -> Callable[[], None]:
    """Everything up to the listening socket; serving itself is returned."""
    from s2kernels.cli import serving

    return serving.serve(args)


def inspect(args: Namespace) -> None:
    """Print what an adapter trains; its files alone are read."""
    from s2kernels.cli.describe import COLUMNS, describe

    report = describe(args.adapter)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    columns = COLUMNS[report["method"]]
    rows = [
        ["-" if entry[name] is None else _text(entry[name]) for name in columns]
        for entry in [*report["layers"], report["total"]]
    ]
    rows.insert(0, [name.replace("_", " ") for name in columns])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        line = [
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(cells)
        ]
        print("  ".join(line).rstrip())


def merge(args: Namespace) -> None:
    """Write base + adapter as a model that knows nothing of adapters."""
    _check_free(args.output)
    from s2kernels.cli.describe import describe

    describe(args.adapter)  # raises where PEFT would load what is left of a damaged adapter
    base = _base(args)
    import torch
    from transformers import AutoTokenizer

    from s2kernels.cli.models import load_base, with_adapter
    from s2kernels.files import replacing

    model = load_base(base, "auto", args.adapter)
    if args.dtype != "auto":
        # Merged in a dtype that holds all values of both, and converted after that. An fp32
        # checkpoint in fp16 would not be recognised as the base of the adapter either.
        dtype = getattr(torch, args.dtype)
        model.to(torch.promote_types(model.dtype, dtype))
    merged = with_adapter(model, args.adapter).merge_and_unload(safe_merge=args.safe)
    if args.dtype != "auto":
        merged.to(dtype)
        if args.safe:
            _check_finite(merged)
    with replacing(args.output) as folder:
        merged.save_pretrained(folder)
        for source in (args.adapter, base):
            if (source / "tokenizer_config.json").is_file():
                AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
                break
    print(f"merged model in {args.output}")


def _check_finite(model: Any) -> None:
    """Raises ValueError for a parameter that fp16, say, cannot hold."""
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise ValueError(f"--safe: {name} is not finite in {model.dtype}")


def export_lora(args: Namespace) -> None:
    """Write the adapter as a LoRA adapter and, with --check, compare the two."""
    _check_free(args.output)
    base = _base(args)
    from s2kernels.lora import export_lora

    export_lora(args.adapter, args.output, format=args.format, rank=args.rank, base=base)
    print(f"LoRA adapter in {args.output}")
    if args.check:
        difference, largest = compare(base, args.adapter, args.output)
        print(f"largest logit difference {difference:.3g}, of logits up to {largest:.3g}, in fp32")


def compare(base: Path, adapter: Path, lora: Path) -> tuple[float, float]:
    """The largest difference in logits between an S2FT adapter and its export, and the largest
    logit; in fp32, on random tokens.
    """
    import torch

    from s2kernels.cli.models import load_base, with_adapter

    # A LoRA is added to the output of the base layer. So is ours here: W0 + delta, written into the
    # weight, is the same to rounding, and that of a whole forward is not what is asked for.
    added = dict(mode="additive", layout="gather")
    logits = []
    for path, fields in ((adapter, added), (lora, {})):
        model = load_base(base, torch.float32, path)
        num = model.get_input_embeddings().num_embeddings
        ids = torch.randint(num, (2, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits.append(with_adapter(model, path, **fields).eval()(input_ids=ids).logits)
    return float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())


def _base(args: Namespace) -> Path:
    """The folder of the base: the one given, or else the one that the adapter names."""
    from s2kernels.adapter import read_files

    named = args.base or read_files(args.adapter)[0].get("base_model_name_or_path")
    if not named or not Path(named, "config.json").is_file():
        raise ValueError(f"no model in {named}: --base must be the folder of the base model")
    return Path(named)


def _check_free(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--output: {path} exists and is not an empty folder")


def select(args: Namespace) -> None:
    """Write the heads and channels that rank first, and a picture of all scores."""
    if args.output.suffix != ".json":
        raise ValueError(f"--output: a name that ends in .json wanted, got {args.output}")
    picture = args.output.with_suffix(".svg")
    for path in (args.output, picture):
        if path.exists():
            raise ValueError(f"--output: {path} exists")
    if args.data is None and args.strategy != "weight":
        raise ValueError(f"--strategy {args.strategy} needs --data")
    import torch

    from s2kernels.cli.figures import draw_scores
    from s2kernels.cli.models import device_of, length_of, load_model, load_tokenizer
    from s2kernels.coupling import structures
    from s2kernels.files import replacing
    from s2kernels.select import budget, check_scope, ranked_units, scores

    if args.strategy != "weight":
        from s2kernels.cli import training
        from s2kernels.cli.examples import for_trainer, read

        training.without_bars()
        records, kind, _ = read(args.data)
        if kind == "preference":
            raise ValueError("--data: completions wanted, got preferences")
    model = load_model(args.model, "auto").eval().to(device_of(args.device))
    found = structures(model)
    counts: dict[int, dict[str, int]] = {}  # by the block that heads or channels are selected in
    for name, structure in found.items():
        is_attention = structure.kind == "attention"
        what, block = ("heads", 1) if is_attention else ("channels", args.granularity)
        total = structure.count(structure.unit) // structure.num_experts
        counts.setdefault(block, {})[name] = budget(getattr(args, what), total, what, block)
    num_experts = {name: structure.num_experts for name, structure in found.items()}
    check_scope(args.scope, num_experts)
    batches = None
    if args.strategy != "weight":
        tokenizer = load_tokenizer(args.tokenizer or str(args.model))
        length = length_of(model, args.max_length)
        records = records.select(range(min(len(records), args.examples)))
        rows = for_trainer(records, kind, tokenizer, args.template, length)
        rows = training.tokenized(tokenizer, rows, length)
        if not len(rows):
            raise ValueError(f"--max-length {length} leaves nothing of any output")
        batches = training.batches(rows, tokenizer)
    values = scores(model, args.strategy, batches)
    ranked: dict[str, torch.Tensor] = {}
    for block, of_these in counts.items():
        ranked |= ranked_units(
            values,
            of_these,
            largest=not args.smallest,
            scope=args.scope,
            block=block,
            num_experts=num_experts,
        )
    units = {name: ranked[name] for name in found if name in ranked}

    selection = {
        "model": str(args.model),
        "strategy": args.strategy,
        "largest": not args.smallest,
        "scope": args.scope,
        "granularity": args.granularity,
        "units": {name: chosen.tolist() for name, chosen in units.items()},
    }
    kinds = {name: structure.kind for name, structure in found.items()}
    with replacing(args.output.parent) as folder:
        (folder / args.output.name).write_text(json.dumps(selection, indent=1) + "\n", "utf-8")
    with replacing(args.output.parent) as folder:  # if it fails, the selection is there
        draw_scores(values, units, kinds, args.strategy, folder / picture.name)
    for kind in dict.fromkeys(kinds.values()):
        chosen = sum(len(units.get(name, ())) for name in kinds if kinds[name] == kind)
        total = sum(len(values[name]) for name in kinds if kinds[name] == kind)
        print(f"{kind}: {chosen} of {total} {'heads' if kind == 'attention' else 'channels'}")
    beside = f", its picture in {picture}" if picture.exists() else ""
    print(f"selection in {args.output}{beside}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
