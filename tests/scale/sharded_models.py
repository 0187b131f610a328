"""Small models with an adapter, sharded in the ways of torch, and trained for some steps."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from s2kernels.peft import S2FTConfig, SpIELConfig

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def base(**fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, vocab_size=128)
        config |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
        return LlamaForCausalLM(LlamaConfig(**config | fields, use_cache=False))


def s2ft(**fields):
    wanted = dict(task_type="CAUSAL_LM", heads=1, channels=8, seed=1) | fields
    return S2FTConfig(**wanted)


def spiel(**fields):
    return SpIELConfig(task_type="CAUSAL_LM", density=0.02, target_modules=TARGETS, **fields)


CONFIGS = {"s2ft": s2ft, "spiel": spiel}


def adapted(method, **fields):
    return get_peft_model(base(), CONFIGS[method](**fields))


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model, by_layer=True, **options):
    options = dict(mesh=mesh()) | options
    for layer in model.get_base_model().model.layers if by_layer else ():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def refusals():
    """What the ValueErrors of calls say, by name, and the function that makes such a call."""
    said = {}

    def ask(name, call):
        try:
            call()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)

    return said, ask


def batches(num=5, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 128, (8, 16), generator=generator) for _ in range(num)]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def values(model):
    return {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model, num=5, rank=0, world=1, optimizer=None, clip=None, seed=7):
    """The mean loss of each step over `world` processes, of which this is `rank`."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for tokens in batches(num, seed):
        mine = tokens.chunk(world)[rank]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    return losses


def distance(one, other):
    """The relative L2 distance of two dictionaries of tensors."""
    assert one.keys() == other.keys()
    flat, others = (torch.cat([x[name].double().flatten() for name in one]) for x in (one, other))
    return ((flat - others).norm() / flat.norm()).item()


@contextmanager
def engaging_fsdp():
    """accelerate shards on accelerators alone; what it does is the same on a CPU."""
    init = AcceleratorState.__init__

    def changed(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = changed
    try:
        yield
    finally:
        AcceleratorState.__init__ = init
        AcceleratorState._reset_state(reset_partial_state=True)
