"""Runs that look at channels, gradients and bytes; kinds "overlap", "locality" and "bytes"."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn

from bench.learning import evaluate
from bench.learning.runs import DOWN, Bench, Run, inputs, sizes
from bench.measure import memory
from bench.methods import comparable
from bench.steps.step import held_bytes
from s2kernels.coupling import structures
from s2kernels.select import scores

RANKED = ("activation", "gradient", "weight")  # scores whose channels are looked at
TOP = 0.01  # share of the entries of a weight that count as large


def overlap(bench: Bench, run: Run) -> dict:
    """Channels of down_proj by score, task against task; the energy of a full update in them.

    The channels are as many as S2FT trains. `run` is the full fine-tuning, done on each task.
    """
    budget = comparable(bench.base.config, rank=run.rank)
    count = sizes(bench.base, budget, DOWN)[1]
    names = [n for n, s in structures(bench.base).items() if s.kind == "ffn"]
    total = bench.base.config.intermediate_size
    chosen: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for task in run.tasks:
        calibration = inputs(bench.material.tasks[task].train[: bench.protocol.calibration])
        for strategy in RANKED:
            values = scores(bench.base, strategy, calibration, progress=False)
            for which, largest in (("largest", True), ("smallest", False)):
                chosen[task, strategy, which] = {
                    name: values[name].topk(count, largest=largest).indices for name in names
                }
    overlaps = []
    for one, other in combinations(run.tasks, 2):
        for strategy in ("activation", "gradient"):  # the weight's are those of no task
            for which in ("largest", "smallest"):
                a, b = chosen[one, strategy, which], chosen[other, strategy, which]
                shares = [len(set(a[n].tolist()) & set(b[n].tolist())) / count for n in names]
                overlaps.append(
                    {
                        "tasks": [one, other],
                        "channels": f"{strategy} {which}",
                        "overlap": mean(shares),
                    }
                )
    energies = []
    for part, task in enumerate(run.tasks):
        merged, _ = bench.trained(run, bench.base, task, part)
        with torch.no_grad():
            energy = {
                name: (weight(merged, name) - weight(bench.base, name)).square().sum(dim=0)
                for name in names
            }
        for strategy in RANKED:
            for which in ("largest", "smallest"):
                taken = chosen[task, strategy, which]
                shares = [float(energy[n][taken[n]].sum() / energy[n].sum()) for n in names]
                energies.append(
                    {"task": task, "channels": f"{strategy} {which}", "energy": mean(shares)}
                )
        best = [float(e.topk(count).values.sum() / e.sum()) for e in energy.values()]
        energies.append({"task": task, "channels": "most energy", "energy": mean(best)})
    return {"chance": count / total, "overlap": overlaps, "energy": energies}


def locality(bench: Bench, run: Run) -> dict:
    """Whether |gradient| is as the outer product of its row and column sums, per projection.

    correlation  of the two over the entries of a weight, mean over the layers
    found        share of the top entries of |gradient| that are top entries of the product
    """
    model = bench.base
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    for example in bench.material.tasks[run.tasks[0]].train[: bench.protocol.calibration]:
        packed = evaluate.row([(example.prompt, example.answer)])
        evaluate.token_losses(model, packed).mean().backward()
    found: dict[str, list[tuple[float, float]]] = {}
    for name, linear in linears.items():
        size = linear.weight.grad.abs()
        product = torch.outer(size.sum(dim=1), size.sum(dim=0))
        top = max(1, round(TOP * size.numel()))
        large, predicted = (set(t.flatten().topk(top).indices.tolist()) for t in (size, product))
        correlation = torch.corrcoef(torch.stack([size.flatten(), product.flatten()]))[0, 1]
        part = float(correlation), len(large & predicted) / top
        found.setdefault(name.rpartition(".")[2], []).append(part)
        linear.weight.requires_grad_(False)
        linear.weight.grad = None
    return {
        "chance": TOP,
        "projections": {
            name: {"correlation": mean([c for c, _ in parts]), "found": mean([f for _, f in parts])}
            for name, parts in found.items()
        },
    }


def held(bench: Bench, run: Run) -> dict:
    """Bytes that SpIEL holds per trained entry, beside the weights and before the activations.

    AG is counted while a window is open and after it is closed. least: what a method that moves
    single entries cannot do without, in fp32: value, gradient, two moments, and an int32 index.
    """
    method = bench.method(run, bench.base, run.tasks[0], 0)
    base = memory.total_bytes(memory.model_tensors(bench.base))
    batch = torch.tensor([bench.material.text[0]])
    method.step(batch)
    entries = method.trained_parameters()
    counted = {}
    for state in ("open", "closed"):
        if state == "closed":
            method.tuner.close()
        parts = held_bytes(method, batch)
        in_all = parts["weights"] - base + parts["gradients"] + parts["optimizer"]
        counted[state] = in_all / entries
    moments = 8 if run.method == "spiel" else 0
    return {"entries": entries, **counted, "least": 4 + 4 + 4 + moments}


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).down_proj.weight


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


KINDS: dict[str, Callable[[Bench, Run], dict]] = {
    "overlap": overlap,
    "locality": locality,
    "bytes": held,
}
