"""What the demo proves of S2FT: the activations that it keeps, to the byte, and its adapters."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.demo.job import FLOOR, S2FT, Job
from bench.methods import Method

# How far a logit of the adapter, loaded or merged, may lie from that of the model that trained it,
# as a share of the largest logit: the same sums are rounded in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_saved(job: Job, methods: Mapping[str, Method], held: Mapping[str, dict]) -> bool:
    """Whether S2FT keeps exactly the activations of the floor, with two differences.

    Of each o_proj it keeps the trained channels of x as well: M * R numbers. Of each FFN it keeps
    gate and up, where the floor's operators keep silu(gate) as well: M * F numbers less. The
    trained channels of down_proj it computes again. held: what `held_bytes` says of each method.
    """
    exact = True
    for name in S2FT:
        slices = dict(methods[name].named_trained())  # (N, R) each
        channels = [delta.shape[1] for place, delta in slices.items() if "down_proj" not in place]
        ffns = len(slices) - len(channels)
        more = job.tokens * sum(channels) * job.dtype.itemsize
        less = job.tokens * ffns * job.shape.intermediate * job.dtype.itemsize
        found = held[name]["saved"] - held[FLOOR]["saved"]
        equal = found == more - less and held[name]["unseen"] == 0
        exact &= equal
        print(
            f"saved by {name}: floor {found:+,} bytes; expected {more:+,} of {len(channels)} "
            f"o_proj and {-less:+,} of {ffns} FFNs; kept elsewhere {held[name]['unseen']:,}: "
            + ("equal" if equal else "NOT EQUAL")
        )
    return exact


def check_adapters(
    job: Job, methods: Mapping[str, Method], base: PreTrainedModel, batch: Tensor, folder: Path
) -> bool:
    """Whether adapters saved in `folder`, loaded into copies of `base` and merged, do the same."""
    intact = True
    for name in S2FT:
        model, path = methods[name].model, folder / name.replace(" ", "-")
        model.save_pretrained(path)
        size = (path / "adapter_model.safetensors").stat().st_size
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), path)
        trained, from_file = logits(model, batch), logits(loaded, batch)
        merged = logits(loaded.merge_and_unload(), batch)
        largest = float(trained.abs().max())
        apart = [float((other - trained).abs().max()) for other in (from_file, merged)]
        good = max(apart) <= TOLERANCE[job.dtype] * largest
        intact &= good
        print(
            f"adapter of {name}, {size:,} bytes: logits up to {largest:.1f}, apart by "
            f"{apart[0]:.1e} loaded, {apart[1]:.1e} merged" + ("" if good else ": TOO MUCH")
        )
    return intact


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor) -> Tensor:
    """fp32 (sequences, length, vocabulary)."""
    return model.eval()(input_ids=batch, use_cache=False).logits.float()
