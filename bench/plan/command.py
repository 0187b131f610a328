"""What training on many GPUs takes on each of them: bytes, collectives and time, predicted.

    python -m bench.plan --model llama-3-70b --gpus 64 --method s2ft full lora --rank 16 64
    python -m bench.plan --results bench/results

Bytes and collectives are counted by running the real code without numbers (`bench.plan.rank`).
Times are predictions from the rates of data sheets and of single kernels (`bench.plan.times`). No
GPU is needed, and none was used.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils import logging

from bench.measure import machine, results
from bench.plan.rank import METHODS, Step, count
from bench.plan.times import CLUSTERS, Cluster, seconds
from bench.steps.model_shapes import TABLE
from bench.steps.work import Ceilings
from s2kernels.cli.options import COUNT

# The committed table: each size on as many GPUs as its users have.
CASES = {
    "llama-2-7b": 8,
    "llama-3-8b": 8,
    "llama-2-13b": 8,
    "llama-3-70b": 64,
    "llama-3.1-405b": 512,
}
FILE = Path("predicted", "plan.json")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    logging.set_verbosity_error()
    entries = []
    for entry in _plans(args):
        entries.append(entry)
        if not args.json:
            print("\n".join(_lines(entry)), flush=True)
    if args.json:
        print(json.dumps(entries, indent=1))
    if args.results is not None:
        path = args.results / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write(path, entries, machine.machine_info(torch.device("cpu")))
        print(path)
    return 0


def _plans(args: argparse.Namespace) -> Iterator[dict]:
    """An entry of the results for each model, method and rank of LoRA."""
    plans = [
        (args, model, method, rank)
        for model in args.model
        for method in args.method
        for rank in (args.rank if method == "lora" else args.rank[:1])
    ]
    if args.jobs == 1:
        yield from itertools.starmap(_plan, plans)
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_plan, *zip(*plans, strict=True))


def _plan(args: argparse.Namespace, model: str, method: str, rank: int) -> dict:
    shape = TABLE[model] if args.layers is None else TABLE[model].cut(args.layers)
    gpus = args.gpus or CASES.get(model, 8)
    case = (shape, method, gpus, args.sequences, args.tokens, rank)
    cluster = _cluster(args)
    found = count(*case, whole=args.whole)
    times = seconds(*case, found, cluster)
    label = f"lora r{rank}" if method == "lora" else method
    params = {"model": model, "layers": shape.layers, "gpus": gpus, "method": label}
    params |= {"sequences": args.sequences, "tokens": args.tokens}
    rates = asdict(cluster) | {"ceilings": cluster.ceilings.name}
    return {
        "name": f"{model} on {gpus}: {label}",
        "params": params | {"cluster": rates},
        "extra_info": asdict(found) | {"seconds": {key: asdict(t) for key, t in times.items()}},
    }


def _lines(entry: dict) -> list[str]:
    """What a person wants to read of an entry."""
    found, step_times = entry["extra_info"], entry["extra_info"]["seconds"]
    held = [f"{part} {found[part] / 2**20:,.0f} MiB" for part in ("weights", "gradients")]
    lines = [
        f"{entry['name']}, {found['trained'] / 1e6:,.1f} M of {found['parameters'] / 1e9:,.2f} G",
        f"  holds: {', '.join(held)}, optimizer {found['optimizer'] / 2**20:,.0f} MiB",
    ]
    for name in ("plain", "checkpointed"):
        step, times = Step(**found[name]), step_times[name]
        low, high = max(times.values()), sum(times.values())
        lines += [
            f"  {name}: activations {step.activations / 2**30:.2f} GiB, "
            f"peak {step.peak / 2**30:.2f} GiB, predicted step {low:.2f} to {high:.2f} s"
        ]
    step = Step(**found["plain"])
    gathers = f"{step.gathers} all-gathers {step.gathered / 2**30:,.2f} GiB"
    return [
        *lines,
        f"  a step: {gathers}, {step.scatters} reduce-scatters {step.scattered / 2**30:,.2f} GiB",
    ]


def _cluster(args: argparse.Namespace) -> Cluster:
    cluster = CLUSTERS[args.gpu]
    if args.ceiling is not None:
        half, copied = (value * 1e12 for value in args.ceiling)
        name = f"{args.ceiling[0]:g} TFLOP/s"
        cluster = replace(cluster, ceilings=Ceilings(name, {"bfloat16": half}, copied))
    links = {"nvlink": args.nvlink, "network": args.network}
    given = {name: rate * 1e9 for name, rate in links.items() if rate is not None}
    return replace(cluster, **given, node=args.node)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=list(TABLE), default=list(CASES), metavar="MODEL")
    add("--gpus", type=COUNT, help="2 or more (default: those of the committed table, else 8)")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--rank", type=COUNT, nargs="+", default=[16, 64], help="of LoRA (default 16 and 64)")
    add("--layers", type=COUNT, help="only so many layers of the model")
    add("--whole", action="store_true", help="run every layer: minutes for 70B, else seconds")
    add("--tokens", type=COUNT, default=4096, help="of a sequence (default 4096)")
    add("--sequences", type=COUNT, default=1, help="of a rank's batch (default 1)")
    add("--gpu", choices=list(CLUSTERS), default="H200", help="whose rates to take (default H200)")
    add("--ceiling", nargs=2, type=float, metavar=("TFLOPS", "TBS"), help="rates of another GPU")
    add("--nvlink", type=float, metavar="GBS", help="GB/s that a GPU receives within its node")
    add("--network", type=float, metavar="GBS", help="GB/s that a GPU receives from other nodes")
    add("--node", type=COUNT, default=8, help="GPUs of a node (default 8)")
    add("--json", action="store_true", help="print JSON")
    add("--results", type=Path, metavar="DIR", help=f"also write DIR/{FILE}")
    add("--jobs", type=COUNT, default=1, help="processes that count side by side (default 1)")
    parser.epilog = f"models: {', '.join(TABLE)}; by default {', '.join(CASES)}"
    args = parser.parse_args(argv)
    if args.gpus == 1:
        parser.error("argument --gpus: must be at least 2, or nothing is sharded")
    if args.layers is not None:
        for model in args.model:
            if args.layers > TABLE[model].of_layers:
                parser.error(f"argument --layers: {model} has {TABLE[model].of_layers}")
    return args
