"""What methods learn, keep and forget on a language model.

    python -m bench.learning STUDY --model DIR [--data DIR] [--budget-s N] [--resume]

STUDY is one of learn, channels, projections, fusion, sequential, overlap, spiel and memory, or
theory, which needs neither model nor data. Results go to a JSON file after every run. With
--resume, runs that are in the files are not done again; without it the study's file must not exist
yet. With --budget-s no run is begun that would probably end later than so many seconds after the
start; the exit code is then 3. docs/learning.md has the protocol.
"""

import argparse
import hashlib
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from bench.learning import data, probes, theory
from bench.learning.protocol import SMALL, TOY
from bench.learning.runs import Bench, Run
from bench.learning.store import Store
from bench.learning.studies import STUDIES, Phases
from bench.measure import machine

RESULTS = machine.ROOT / "bench" / "results" / "cpu" / "learning"


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    if args.study == "theory":
        return theory.main(args.results)
    path = args.results / f"{args.study}.json"
    if path.exists() and not args.resume:
        parser.error(f"{path} exists: --resume goes on with it, or move it away")
    if args.model is None or not list(args.model.glob("*.safetensors")):
        parser.error(f"--model must be a folder with a model as safetensors, got {args.model}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    machine.keep_freed_memory()
    protocol = TOY if args.toy else SMALL
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        material = data.load(args.data, tokenizer, protocol)
    except ValueError as error:
        parser.error(str(error))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base.requires_grad_(False)
    common = {"protocol": protocol.key(), "model": digest(args.model), "data": material.digest}
    store = Store(args.results, common)
    bench = Bench(base, tokenizer, material, protocol)
    ends = time.perf_counter() + (args.budget_s or float("inf"))

    def find(run: Run) -> dict | None:
        return store.find(on_what_there_is(run, bench).key())

    try:
        return carry_out(args.study, STUDIES[args.study](find), bench, store, ends)
    except ValueError as error:
        parser.error(str(error))


def carry_out(study: str, phases: Phases, bench: Bench, store: Store, ends: float) -> int:
    """Does what is missing, phase by phase. Returns 3 where the time did not suffice, else 0."""
    longest = 0.0
    for number, runs in enumerate(phases, start=1):
        for place, run in enumerate(runs, start=1):
            label = f"{study}, phase {number}, run {place} of {len(runs)}: {described(run)}"
            key = on_what_there_is(run, bench).key()
            if store.find(key) is not None:
                continue
            if time.perf_counter() + longest > ends:
                print(f"out of time before {label}; --resume goes on here", flush=True)
                return 3
            began = time.perf_counter()
            perform = probes.KINDS.get(run.kind, Bench.perform)
            result = perform(bench, on_what_there_is(run, bench))
            longest = max(longest, time.perf_counter() - began)
            result["seconds in all"] = time.perf_counter() - began
            store.add(study, key, result, bench.material.notes)
            print(f"{label}: {outcome(result)}, {result['seconds in all']:.0f} s", flush=True)
    print(f"{study} is complete", flush=True)
    return 0


def on_what_there_is(run: Run, bench: Bench) -> Run:
    """`run`, which trains on the docstrings where there is no other task."""
    if run.tasks == ("math",) and "math" not in bench.material.tasks:
        return replace(run, tasks=("docs",))
    return run


def described(run: Run) -> str:
    return ", ".join(
        value if name == "method" else f"{name} {value}" for name, value in run.key().items()
    )


def outcome(result: dict) -> str:
    """The most important numbers of a result."""
    if "losses" not in str(result):
        return ", ".join(f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, float | int))
    if "validation loss" in result:
        measures = ", ".join(f"{k} {v:.3f}" for k, v in result["measures"].items())
        return f"validation {result['validation loss']:.3f}, {measures}"
    tasks = result["stages"][-1]["tasks"] if "stages" in result else result["fused"]["1.0"]
    return ", ".join(f"{task} {each['validation loss']:.3f}" for task, each in tasks.items())


def digest(folder: Path) -> str:
    """Of the weights of a model."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                found.update(block)
    return found.hexdigest()[:16]


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=__doc__.splitlines()[0]
    )
    names = [*STUDIES, "theory"]
    parser.add_argument("study", choices=names, metavar="STUDY", help=", ".join(names))
    parser.add_argument("--model", type=Path, help="folder of a Llama-family model")
    text = f"folder of {', '.join(data.FILES.values())}; without it only learn runs, on docstrings"
    parser.add_argument("--data", type=Path, help=text)
    parser.add_argument("--budget-s", type=float, metavar="SECONDS", help="begin no run after it")
    parser.add_argument("--resume", action="store_true", help="go on with the results that exist")
    parser.add_argument("--toy", action="store_true", help="smallest sizes, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default %(default)s")
    args = parser.parse_args(argv)
    if args.budget_s is not None and not args.budget_s > 0:
        parser.error(f"--budget-s must be above 0, got {args.budget_s}")
    return parser, args


if __name__ == "__main__":
    raise SystemExit(main())
