"""What the demo does, by device: sizes, budgets and learning rates."""

from dataclasses import dataclass, replace

import torch

from bench.methods import METHODS, Budget, Method

# The names of the demo's results.
FLOOR = "frozen floor"
S2FT = ("s2ft inplace", "s2ft additive")


@dataclass(frozen=True)
class Job:
    """Sizes of the model and of the work; a step is batch * length tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    length: int
    batch: int
    pretrain_batch: int  # smaller: more steps in the same time
    budget: Budget
    dtype: torch.dtype  # of the checkpoint that is fine-tuned
    pretrain_seconds: float
    pretrain_lr: float
    lr_scale: float  # times the rates of ENTRANTS
    steps: int  # of fine-tuning, each method
    untimed: int  # of these, the first ones that are left out of the times
    depth_rounds: int  # rounds of S2FT without dx below its first layer
    evaluations: int  # of the held-out loss while fine-tuning
    held_out_batches: int

    @property
    def tokens(self) -> int:
        """M of a step."""
        return self.batch * self.length


# Wide rather than deep: what S2FT adds to a layer grows with the width, the layer with its square.
CPU = Job(
    hidden=512,
    intermediate=1408,
    layers=2,
    heads=32,
    kv_heads=8,
    length=128,
    batch=16,
    pretrain_batch=4,
    budget=Budget(heads=1, channels=24, rank=16, seed=0),
    dtype=torch.float32,
    pretrain_seconds=60.0,
    pretrain_lr=2e-3,
    lr_scale=1.0,
    steps=60,
    untimed=4,
    depth_rounds=10,
    evaluations=4,
    held_out_batches=8,
)
# Large enough for the kernels, rather than their launches, to take the time.
CUDA = replace(
    CPU,
    hidden=1024,
    intermediate=2816,
    layers=8,
    heads=16,
    kv_heads=4,
    length=512,
    batch=32,
    pretrain_batch=32,
    budget=Budget(heads=1, channels=64, rank=16, seed=0),
    dtype=torch.bfloat16,
    pretrain_lr=1e-3,
    lr_scale=0.25,  # that base was a quarter as wide; not searched
    steps=200,
)
TOY = replace(
    CPU,
    hidden=32,
    intermediate=64,
    layers=2,
    heads=4,
    kv_heads=2,
    length=16,
    batch=4,
    pretrain_batch=4,
    budget=Budget(heads=1, channels=4, rank=2, seed=0),
    pretrain_seconds=0.5,
    steps=8,
    untimed=2,
    depth_rounds=4,
    evaluations=2,
    held_out_batches=2,
)


@dataclass(frozen=True)
class Entrant:
    """lr is the peak learning rate of AdamW, None where nothing is trained."""

    name: str
    method: type[Method]
    lr: float | None


# Peak learning rates, searched in steps of about two: the lowest held-out loss after 100 steps of
# the CPU job, on a base of half its width and twice its depth. S2FT's would bear twice its own.
# SpIEL's is of 60 steps on the job's own base after 422 steps: losses 1.978, 1.955 and 1.965 at
# 1e-2, 2e-2 and 4e-2 with the cosine schedule (2.016 at 2e-2 with the linear one), where LoRA's
# were 1.994, 1.965, 1.970 and 2.238 at 3e-3, 5e-3, 1e-2 and 2e-2.
ENTRANTS = (
    Entrant("full", METHODS["full"], 4e-3),
    Entrant("lora", METHODS["lora"], 1e-2),
    Entrant("spiel", METHODS["spiel"], 2e-2),
    Entrant(S2FT[0], METHODS["s2ft_inplace"], 1e-1),
    Entrant(S2FT[1], METHODS["s2ft_additive"], 1e-1),
    Entrant(FLOOR, METHODS["frozen"], None),
)

# How far a logit of the adapter, loaded or merged, may lie from that of the model that trained it,
# as a share of the largest logit: the same sums are rounded in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
