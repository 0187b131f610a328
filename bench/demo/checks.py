"""What the demo proves of S2FT: the activations that it keeps, to the byte, and its adapters."""

import copy
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from bench.demo.job import FLOOR, S2FT, Job
from bench.demo.training import Run
from bench.methods.s2ft import in_slices

# How far a logit of the adapter, loaded or merged, may lie from that of the model that trained it,
# as a share of the largest logit: the same sums are rounded in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_saved(job: Job, runs: dict[str, Run], entries: dict[str, dict]) -> bool:
    """Whether S2FT keeps exactly the activations of the floor, with two differences.

    Of each o_proj it keeps the trained channels of x as well: M * R numbers. Of each FFN it keeps
    gate and up, where the floor's operators keep silu(gate) as well: M * F numbers less. The
    trained channels of down_proj it computes again.
    """
    sizes = {name: measured["extra_info"]["bytes"] for name, measured in entries.items()}
    exact = True
    for name in S2FT:
        slices = in_slices(runs[name].model)
        channels = {place: r for place, r in slices.items() if "down_proj" not in place}
        ffns = len(slices) - len(channels)
        more = sum(job.tokens * r for r in channels.values()) * job.dtype.itemsize
        less = ffns * job.tokens * job.shape.intermediate * job.dtype.itemsize
        found = sizes[name]["saved"] - sizes[FLOOR]["saved"]
        equal = found == more - less and sizes[name]["unseen"] == 0
        exact &= equal
        kept = {"r": slices, "beyond_floor": more - less, "exact": equal}
        entries[name]["extra_info"]["in_slices"] = kept
        print(
            f"saved by {name}: floor {found:+,} bytes; expected {more:+,} of {len(channels)} "
            f"o_proj and {-less:+,} of {ffns} FFNs; kept elsewhere {sizes[name]['unseen']:,}: "
            + ("equal" if equal else "NOT EQUAL")
        )
    return exact


def check_adapters(
    job: Job, runs: dict[str, Run], base: LlamaForCausalLM, batch: Tensor, folder: Path | None
) -> bool:
    """Whether saved adapters, loaded into fresh copies of the base and merged, do the same."""
    intact = True
    for name in S2FT:
        with tempfile.TemporaryDirectory() as temporary:
            path = (folder or Path(temporary)) / name.replace(" ", "-")
            runs[name].model.save_pretrained(path)
            size = (path / "adapter_model.safetensors").stat().st_size
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), path)
        trained, from_file = logits(runs[name].model, batch), logits(loaded, batch)
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
