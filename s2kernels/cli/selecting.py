"""`s2kernels select`: heads and channels that rank first, without training."""

import json
from argparse import Namespace

from torch import Tensor

from s2kernels.cli.figures import draw_scores
from s2kernels.cli.models import device_of, length_of, load_model, load_tokenizer
from s2kernels.coupling import structures
from s2kernels.files import replacing
from s2kernels.select import budget, check_scope, ranked_units, scores


def select(args: Namespace) -> None:
    """Write what is selected, and a picture of all scores."""
    if args.output.suffix != ".json":
        raise ValueError(f"--output: a name that ends in .json wanted, got {args.output}")
    picture = args.output.with_suffix(".svg")
    for path in (args.output, picture):
        if path.exists():
            raise ValueError(f"--output: {path} exists")
    if args.data is None and args.strategy != "weight":
        raise ValueError(f"--strategy {args.strategy} needs --data")
    if args.strategy != "weight":
        from s2kernels.cli import training  # which takes seconds
        from s2kernels.cli.examples import first_completions

        training.without_bars()
        records, kind = first_completions(args)
        tokenizer = load_tokenizer(args.tokenizer or str(args.model))
    model = load_model(args.model, "auto").eval().to(device_of(args.device))
    found = structures(model)
    kinds = {name: structure.kind for name, structure in found.items()}
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
        length = length_of(model, args.max_length)
        _, rows = training.prepared(records, kind, tokenizer, args.template, length)
        batches = training.batches(rows, tokenizer)
    values = scores(model, args.strategy, batches)
    how = dict(largest=not args.smallest, scope=args.scope)
    ranked: dict[str, Tensor] = {}
    for block, of_these in counts.items():
        ranked |= ranked_units(values, of_these, block=block, num_experts=num_experts, **how)
    units = {name: ranked[name] for name in found if name in ranked}

    selection = {"model": str(args.model), "strategy": args.strategy, **how}
    chosen = {name: selected.tolist() for name, selected in units.items()}
    selection |= {"granularity": args.granularity, "units": chosen}
    with replacing(args.output.parent) as folder:
        (folder / args.output.name).write_text(json.dumps(selection, indent=1) + "\n", "utf-8")
    with replacing(args.output.parent) as folder:  # if it fails, the selection is there
        draw_scores(values, units, kinds, args.strategy, folder / picture.name)
    for kind in dict.fromkeys(kinds.values()):
        num = sum(len(units.get(name, ())) for name in kinds if kinds[name] == kind)
        total = sum(len(values[name]) for name in kinds if kinds[name] == kind)
        print(f"{kind}: {num} of {total} {'heads' if kind == 'attention' else 'channels'}")
    beside = f", its picture in {picture}" if picture.exists() else ""
    print(f"selection in {args.output}{beside}")
