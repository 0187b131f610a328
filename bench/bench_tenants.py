"""Decoding for many tenants: a step of 32 rows whose adapters are drawn anew, by popularity.

    python -m pytest bench/bench_tenants.py --results bench/results --again

The k-th of N adapters is drawn in proportion to 1 / k (Zipf's law). Each trains one head of o_proj
and 28 channels of down_proj in each of 4 layers of hidden size 512; LoRAs have rank 16 in the same
layers, as many bytes. Beside the model without adapters stand

    lora, peft      PEFT's loop over the adapters of a batch; up to 128: adding them takes long
    lora, bmm       the factors of each row gathered, then two batched products
    lora, grouped   both factors as grouped ops, without copies, as Punica's kernels are
    exported        our adapters as LoRAs of rank 64, the next that holds them, by "lora, grouped"
    ours            `s2kernels.serve`, with room for 64 adapters on the device, which come and go
                    where there are more; all others keep all of theirs
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn

from bench.measure.beside import compare, quartiles
from bench.measure.served import FFN, HIDDEN, LAYERS, adapter, decoding, llama
from s2kernels import backend
from s2kernels.groups import make_groups
from s2kernels.serve import Serving

ROWS, RESIDENT, RANK, EXPORTED_RANK = 32, 64, 16, 64
PEFT_MOST = 128
WIDTHS = {"self_attn.o_proj": HIDDEN, "mlp.down_proj": FFN}  # of the inputs of trained layers
MODULES = {f"model.layers.{i}.{name}": K for i in range(LAYERS) for name, K in WIDTHS.items()}
Factors = dict[str, tuple[Tensor, Tensor]]  # of all adapters: (N, r, K) and (N, r, out_features)
Assign = Callable[[list[int]], AbstractContextManager]


def random_factors(num: int) -> Factors:
    return {
        name: (torch.randn(num, RANK, K) * 0.02, torch.randn(num, RANK, HIDDEN) * 0.02)
        for name, K in MODULES.items()
    }


def exported(num: int) -> Factors:
    """What `s2kernels.lora` makes of the adapters: one-hot rows, then deltas, then zeros."""
    found = {
        name: (torch.zeros(num, EXPORTED_RANK, K), torch.zeros(num, EXPORTED_RANK, HIDDEN))
        for name, K in MODULES.items()
    }
    for number in range(num):
        for name, part in adapter(number).items():
            down, up = found[name]
            R = len(part.index)
            down[number, torch.arange(R), part.index.long()] = 1
            up[number, :R] = part.delta.t()
    return found


def with_bmm(model: nn.Module, factors: Factors) -> Assign:
    chosen: list[Tensor] = []

    def hook(name: str) -> Callable[..., Tensor]:
        down, up = factors[name]

        def add(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            (rows,) = chosen
            u = torch.bmm(args[0], down[rows].transpose(1, 2))
            return y.baddbmm_(u, up[rows])

        return add

    @contextmanager
    def assign(drawn: list[int]):
        chosen[:] = [torch.tensor(drawn)]
        yield

    for name in factors:
        model.get_submodule(name).register_forward_hook(hook(name))
    return assign


def with_groups(model: nn.Module, factors: Factors) -> Assign:
    """u (M, r) gets the products with the rows of the first factor, one for each channel of u; the
    second factor is an in-slice of u. Both are grouped ops with the same groups.
    """
    chosen: list = []

    def hook(name: str) -> Callable[..., Tensor]:
        down, up = (factor.flatten(0, 1) for factor in factors[name])
        rank, ops = factors[name][0].shape[1], backend.select(up)

        def add(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            x = args[0].flatten(0, 1)
            u = torch.zeros(len(x), rank, dtype=x.dtype)
            ops.grouped_out_(u, x, down, chosen[0])
            ops.grouped_in_(y.view(-1, y.shape[-1]), u, up, chosen[0])
            return y

        return add

    rank = next(iter(factors.values()))[0].shape[1]

    @contextmanager
    def assign(drawn: list[int]):
        distinct = sorted(set(drawn))
        of_row = torch.tensor([distinct.index(number) for number in drawn])
        rows = [torch.arange(number * rank, (number + 1) * rank) for number in distinct]
        chosen[:] = [make_groups(of_row, rows, [torch.arange(rank)] * len(distinct))]
        yield

    for name in factors:
        model.get_submodule(name).register_forward_hook(hook(name))
    return assign


def with_peft(model: nn.Module, num: int) -> tuple[nn.Module, Assign]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, num):
        wrapped.add_adapter(f"a{number}", config)
    wrapped.eval()

    def assign(drawn: list[int]) -> AbstractContextManager:
        return wrapped._enable_peft_forward_hooks(adapter_names=[f"a{n}" for n in drawn])

    return wrapped.base_model, assign


def stepping(model: nn.Module, assign: Assign, probabilities: Tensor) -> Callable[[], None]:
    """Steps of the same draws for every method."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(probabilities, ROWS, replacement=True, generator=generator).tolist()
    with assign(draws):
        step = decoding(model, ROWS)

    def run() -> None:
        drawn = torch.multinomial(probabilities, ROWS, replacement=True, generator=generator)
        with torch.no_grad(), assign(drawn.tolist()):
            step()

    return run


@pytest.mark.parametrize("adapters", [8, 32, 128, 512])
def bench_tenants(benchmark, adapters):
    torch.set_num_threads(1)
    num, plain = 8 if benchmark.disabled else adapters, llama()
    popularity = 1 / torch.arange(1, num + 1, dtype=torch.float64)
    channels = sum(len(part.index) for part in adapter(0).values())
    served = Serving(copy.deepcopy(plain), pool_bytes=RESIDENT * channels * HIDDEN * 4)
    for number in range(num):
        served.register(f"a{number}", adapter(number))

    def ours(drawn: list[int]) -> AbstractContextManager:
        return served.rows([f"a{number}" for number in drawn])

    @contextmanager
    def nothing(drawn: list[int]):
        yield

    models = {name: copy.deepcopy(plain) for name in ("bmm", "grouped", "exported", "peft")}
    loras = random_factors(num)
    methods = {
        "base": (plain, nothing),
        "lora, bmm": (models["bmm"], with_bmm(models["bmm"], loras)),
        "lora, grouped": (models["grouped"], with_groups(models["grouped"], loras)),
        "exported": (models["exported"], with_groups(models["exported"], exported(num))),
    }
    if num <= PEFT_MOST:
        methods["lora, peft"] = with_peft(models["peft"], num)
    run = stepping(served.model, ours, popularity)
    others = {name: stepping(*method, popularity) for name, method in methods.items()}
    compare(benchmark, run, others, adapters=num, rows=ROWS, resident=RESIDENT)
    if not benchmark.disabled:
        seconds = benchmark.extra_info["rounds"]
        base = seconds["base"]
        over_base = {name: quartiles(found, base) for name, found in seconds.items()}
        benchmark.extra_info["over_base"] = over_base
    served.close()
