"""The demo: one small Llama, fine-tuned by several methods side by side, and what each costs.

    python -m bench.demo [--help]

Pre-trains a byte-level Llama on the source code of Python's standard library, then fine-tunes
copies of that checkpoint on the English text of Python's language reference. In every round each
method takes one step on the same batch, and its time is compared with that of the frozen floor in
the same round. Prints a table, writes the results, draws the figures, and takes the S2FT adapters
through save, load and merge. A slow machine takes fewer rounds, so that the demo ends in time.

Exits with 1 if S2FT keeps one byte more or less than `bench.demo.checks` says, or if an adapter
does not come back as it was trained.
"""

import argparse
import copy
import statistics
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from bench.demo import corpus, job
from bench.demo.checks import check_adapters, check_saved
from bench.demo.job import ENTRANTS, FLOOR, S2FT, Job
from bench.demo.training import finetune, pretrain
from bench.measure import machine, results, timing
from bench.methods import METHODS, Method, Options
from bench.steps.step import held_bytes
from plots import draw_file
from plots.tables import demo_rows

OUT = machine.ROOT / "out"
DEPTH_ROUNDS = 8  # of S2FT without dx below its first trained layer
LEGEND = """\
step / floor: median and quartiles of rounds, with the optimizer
every method computes dx down to the embedding, as the floor does; as run: S2FT without that
optimizer, saved: MiB of its states, and of the activations that are kept for the backward
held-out loss: nats per byte
"""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = machine.default_device()
    chosen = job.TOY if args.toy else job.CPU if device.type == "cpu" else job.CUDA
    chosen = replace(chosen, budget_s=args.budget_s or chosen.budget_s)
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    # PEFT reads a property of the model that transformers is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    code = corpus.as_tokens(corpus.source_code())
    english, held_out = corpus.split(corpus.as_tokens(corpus.reference_text()), held_out=0.1)
    print(
        f"Python's standard library: pre-training on {len(code) / 1e6:.2f} MB of source code, "
        f"fine-tuning on {len(english) / 1e6:.2f} MB of English reference, "
        f"{len(held_out) / 1e6:.2f} MB of it held out"
    )
    base, pretraining = pretrain(chosen, code, job.PRETRAINING * chosen.budget_s, device)
    chosen = replace(chosen, steps=affordable_steps(chosen, statistics.median(pretraining)))

    generator = torch.Generator().manual_seed(chosen.seed)
    windows = partial(corpus.random_batch, length=chosen.length, generator=generator)
    probes = windows(held_out, job.HELD_OUT_BATCHES * chosen.batch).to(device).split(chosen.batch)
    batches = windows(english, chosen.steps * chosen.batch).to(device).split(chosen.batch)
    # dx is computed all the way down, as in the floor. Otherwise a method whose first trained layer
    # lies further up would be compared at another depth of the backward.
    deep = Options(full_depth=True)
    methods = {
        name: METHODS[method](copy.deepcopy(base), chosen.budget(name), lr * chosen.lr_scale, deep)
        for name, (method, lr) in ENTRANTS.items()
    }
    rounds, losses, curves = finetune(methods, batches, probes, device)
    times = {name: [each[name] for each in rounds[job.UNTIMED :]] for name in methods}
    held = {name: held_bytes(method, probes[0]) for name, method in methods.items()}
    as_run = ratios_as_run(methods, probes[0], device)
    exact = check_saved(chosen, methods, held)
    intact = check_adapters(chosen, methods, base, probes[0], args.adapters)

    extra: dict = {"parameters": base.num_parameters()}
    entries = [benchmark(chosen, "pre-training", pretraining, extra)]
    for name, method in methods.items():
        extra = {
            "trained_parameters": method.trained_parameters(),
            "ratio_to_floor": timing.ratio(times[name], times[FLOOR]),
            "bytes": held[name],
            "held_out": {"steps": list(curves[name]), "losses": list(curves[name].values())},
            "losses": [float(loss) for loss in losses[name]],
        }
        extra |= {"ratio_as_run": as_run[name]} if name in as_run else {}
        entries.append(benchmark(chosen, name, times[name], extra))
    path = args.results / machine.device_name(device) / "demo.json"
    results.write(path, entries, machine.machine_info(device))
    print(f"\n{len(pretraining)} steps of pre-training, {chosen.steps} steps with each method")
    print(f"\n{results.table(demo_rows(results.read(path)))}\n\n{LEGEND}\nresults: {path}")
    for figure in draw_file(path, args.figures):
        print(f"figure: {figure}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0 if exact and intact else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.splitlines()[0]
    )
    seconds = f"of the whole demo, about; default {job.CPU.budget_s:.0f}"
    parser.add_argument("--budget-s", type=float, metavar="SECONDS", help=seconds)
    parser.add_argument("--toy", action="store_true", help="seconds, to see that it runs")
    for name in ("results", "figures", "adapters"):
        default = OUT / name
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"default out/{name}")
    args = parser.parse_args(argv)
    if args.budget_s is not None and not args.budget_s > 0:
        parser.error(f"--budget-s must be above 0, got {args.budget_s}")
    return args


def affordable_steps(chosen: Job, pretraining_seconds: float) -> int:
    """How many rounds there is time for, if every step takes what one of full fine-tuning takes."""
    step = pretraining_seconds * chosen.batch / chosen.pretrain_batch
    rounds = int(job.FINETUNING * chosen.budget_s / (step * len(ENTRANTS)))
    return min(chosen.steps, max(chosen.least_steps, rounds))


def benchmark(chosen: Job, name: str, seconds: list[float], extra: dict) -> dict:
    """One entry of pytest-benchmark's JSON; `seconds` of every timed step."""
    dtype = str(chosen.dtype).removeprefix("torch.")
    return {
        "group": "demo",
        "name": name,
        "fullname": f"bench/demo::{name}",
        "params": asdict(chosen) | {"dtype": dtype, "tokens": chosen.tokens},
        "stats": timing.stats(seconds),
        "extra_info": extra,
    }


def ratios_as_run(
    methods: dict[str, Method], batch: Tensor, device: torch.device
) -> dict[str, float]:
    """Step over floor of S2FT as a user runs it: without dx below its first trained layer.

    The learning rates are 0 by now, so the models stay as they were trained.
    """
    for name in S2FT:
        methods[name].full_depth = False
    actions = {name: partial(methods[name].step, batch) for name in (*S2FT, FLOOR)}
    rounds = timing.interleave(actions, DEPTH_ROUNDS, device)
    rounds = list(tqdm(rounds, "S2FT as run", DEPTH_ROUNDS, leave=False))
    return {
        name: statistics.median(times[name] / times[FLOOR] for times in rounds) for name in S2FT
    }


if __name__ == "__main__":
    raise SystemExit(main())
