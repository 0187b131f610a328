"""`s2kernels merge` and `s2kernels export-lora`: an adapter as what others can load."""

from argparse import Namespace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from s2kernels import lora
from s2kernels.cli.describe import describe
from s2kernels.cli.models import base_of, load_base, with_adapter
from s2kernels.cli.runs import check_empty
from s2kernels.files import replacing


def merge(args: Namespace) -> None:
    """Write base + adapter as a model that knows nothing of adapters.

    Raises ValueError for an adapter that does not fit and for a merged weight that is not finite.
    """
    check_empty(args.output)
    describe(args.adapter)  # raises where PEFT would load what is left of a damaged adapter
    base = base_of(args.adapter, args.base)
    model = load_base(base, "auto", args.adapter)
    dtype = model.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    # Merged in a dtype that holds all values of both, and converted after that. An fp32 checkpoint
    # in fp16 would not be recognised as the base of the adapter either.
    model.to(torch.promote_types(model.dtype, dtype))
    merged = with_adapter(model, args.adapter).merge_and_unload().to(dtype)
    for name, value in merged.named_parameters():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}; see --dtype")
    with replacing(args.output) as folder:
        merged.save_pretrained(folder)
        for source in (args.adapter, Path(base)):
            if (source / "tokenizer_config.json").is_file():
                AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
                break
    print(f"merged model in {args.output}")


def export_lora(args: Namespace) -> None:
    """Write the adapter as a LoRA adapter and, with --check, compare the two."""
    check_empty(args.output)
    base = base_of(args.adapter, args.base)
    lora.export_lora(args.adapter, args.output, format=args.format, rank=args.rank, base=base)
    print(f"LoRA adapter in {args.output}")
    if not args.check:
        return
    # A LoRA is added to the output of the base layer. So is ours here: W0 + delta, written into the
    # weight, is the same to rounding, and that of a whole forward is not what is asked for.
    added = dict(mode="additive", layout="gather")
    logits = []
    for path, fields in ((args.adapter, added), (args.output, {})):
        model = load_base(base, torch.float32, path)
        num = model.get_input_embeddings().num_embeddings
        ids = torch.randint(num, (2, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits.append(with_adapter(model, path, **fields).eval()(input_ids=ids).logits)
    difference, largest = (logits[0] - logits[1]).abs().max(), logits[0].abs().max()
    print(f"largest logit difference {difference:.3g}, of logits up to {largest:.3g}, in fp32")
