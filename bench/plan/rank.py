"""What one of many equal ranks holds and exchanges in a training step, counted and not computed.

The code is that of a real run: the model of transformers, `get_peft_model`, torch's `fully_shard`
on each decoder layer, the embedding and the head. The process group is torch's fake one, which
takes every collective and does nothing. The tensors are torch's FakeTensors, which have sizes and
no numbers. So a model of any size runs on one small machine, at its full depth if asked.

Torch's FSDPMemTracker says which bytes are alive after the forward and at the peak. A dispatch mode
counts the collectives. The ops of s2kernels are those of a CPU, in plain torch. They keep what the
kernels keep, but have temporaries that these do without: the peak is a bound from above.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from bench.measure import memory
from bench.methods import Options
from bench.methods.base import adamw
from bench.steps.model_shapes import Shape
from s2kernels.causal_mask import no_needless_mask
from s2kernels.peft import S2FTConfig
from s2kernels.peft.host import premises

METHODS = ("full", "lora", "s2ft")
FEW = 3  # layers
GATHER, SCATTER = "_allgather_base_", "_reduce_scatter_base_"


@dataclass(frozen=True)
class Step:
    """Of one rank, in bytes.

    activations  kept from the forward for the backward, the logits among them
    peak         the most alive at any moment of the step, with everything that the rank holds
    gathered     made by all-gathers, of which there are `gathers`
    scattered    taken by reduce-scatters, of which there are `scatters`
    """

    activations: int
    peak: int
    gathers: int
    gathered: int
    scatters: int
    scattered: int


@dataclass(frozen=True)
class Rank:
    """What a rank holds, in bytes, and its step without and with gradient checkpointing.

    parameters, trained: numbers in the whole model, with the adapter, and those that are trained.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    plain: Step
    checkpointed: Step


def count(
    shape: Shape,
    method: str,
    gpus: int,
    batch: int,
    length: int,
    rank: int = 16,
    whole: bool = False,
) -> Rank:
    """One of `gpus` ranks that train a model of `shape` with `method` under FSDP2.

    Each rank has its own batch (batch, length) of tokens. Products and all-gathers are bf16. What
    is frozen is held in bf16. What is trained, its gradients and the states of AdamW are fp32.
    method: "full"; "lora", with matrices of `rank` beside all linear layers; "s2ft", as
    `S2FTConfig` is by default.
    whole: run all layers. Otherwise models of 3 and of 4 layers are run and continued to all
    layers, which are alike: all numbers but the peak are a straight line in depth.

    Raises ValueError for another method and for fewer than 2 GPUs.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if gpus < 2:
        raise ValueError(f"gpus must be at least 2, or nothing is sharded, got {gpus}")
    case = (method, gpus, batch, length, rank)
    if whole or shape.layers <= FEW + 1:
        return _counted(shape, *case)
    low, high = (_counted(shape.cut(n, shape.vocab), *case) for n in (FEW, FEW + 1))
    return _line(low, high, shape.layers - FEW)


def _line(low: Any, high: Any, times: int) -> Any:
    """`low` and `times` what `high` has more; of dataclasses, for each number."""
    if isinstance(low, int):
        return low + times * (high - low)
    parts = [(getattr(low, each.name), getattr(high, each.name)) for each in fields(low)]
    return type(low)(*(_line(*pair, times) for pair in parts))


def _counted(shape: Shape, method: str, gpus: int, batch: int, length: int, rank: int) -> Rank:
    # the indices of S2FT are real
    with _fake_ranks(gpus) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        model = _adapted(shape, method, rank, length)
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        numbers, of_trained = (sum(p.numel() for p in ps) for ps in (parameters, trained))
        _shard(model, mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = adamw(trained, 1e-4)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes its states
        held = {
            "weights": _bytes(model.parameters()),
            "gradients": _bytes(memory.gradients(model)),
            "optimizer": _bytes(memory.states(optimizer)),
        }
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        plain = _step(model, optimizer, tokens)
        Options(checkpointing=True).after(model, _base(model))
        checkpointed = _step(model, optimizer, tokens)
    return Rank(numbers, of_trained, **held, plain=plain, checkpointed=checkpointed)


def _adapted(shape: Shape, method: str, rank: int, length: int) -> nn.Module:
    """The model with what is trained of it, as a user would make it."""
    config = shape.config(length)
    if method == "lora":
        return _with_lora(
            config, LoraConfig("CAUSAL_LM", r=rank, target_modules=[*shape.linears()])
        )
    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if method == "s2ft":
        model = get_peft_model(model, S2FTConfig(task_type="CAUSAL_LM"))
    return model


def _with_lora(config: PretrainedConfig, lora: LoraConfig) -> nn.Module:
    """PEFT moves LoRA's matrices, which fake tensors do not let it do. So LoRA is made on the meta
    device, and fake tensors take the places of what is there; what is trained is fp32, as PEFT has
    it.
    """
    with unset_fake_temporarily():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model.train(), lora)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                trained = parameter.requires_grad
                dtype = torch.float32 if trained else parameter.dtype
                fake = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=trained)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _base(model: nn.Module) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 with a group for each layer, the embedding, the head, and the rest: the last norm."""
    base = _base(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*base.model.layers, base.model.embed_tokens, base.lm_head, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Step:
    optimizer.zero_grad()
    tracker, collectives = FSDPMemTracker(model, optimizer), _Collectives()
    # A fake mask cannot be looked at. The tracker's hooks on all modules only follow names, and no
    # module should step aside for them.
    unwatched = patch.object(premises, "GLOBAL_HOOKS", [])
    with no_needless_mask(_base(model)), unwatched, tracker, collectives:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        activations = _alive(tracker, "current")["ACT"]
        loss.backward()
        optimizer.step()
    others = collectives.count.keys() - {GATHER, SCATTER}
    if others:
        raise RuntimeError(f"collectives that the plan does not know: {sorted(others)}")
    return Step(
        activations,
        _alive(tracker, "peak")["Total"],
        collectives.count[GATHER],
        collectives.bytes[GATHER],
        collectives.count[SCATTER],
        collectives.bytes[SCATTER],
    )


def _alive(tracker: FSDPMemTracker, when: str) -> dict[str, int]:
    """Bytes by kind of tensor."""
    on_cpu = tracker.get_tracker_snapshot(when)[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: nbytes for kind, nbytes in on_cpu.items()}


class _Collectives(TorchDispatchMode):
    """Counts collectives by name, and the bytes of the larger of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.count[name] += 1
            self.bytes[name] += max((x.numel() * x.itemsize for x in tensors), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the shards of this rank."""
    shards = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.itemsize for x in shards)


@contextmanager
def _fake_ranks(gpus: int) -> Iterator[DeviceMesh]:
    """Rank 0 of a fake process group. Raises RuntimeError where there is a group already."""
    if dist.is_initialized():
        raise RuntimeError("a plan makes its own process group, and there is one already")
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (gpus,))
    finally:
        dist.destroy_process_group()
