"""Steps of one large model where time on a GPU is short: each method is built once for all sizes.

    python -m bench.steps.few_builds --results FOLDER [--budget-s 340] [--plan] [--toy]

LLaMA-2-7B in bf16. First it says which backend torch's SDPA takes. Then the most valuable numbers
come first:

    steps     of each method: bytes at the largest of three sizes, counted on a model of its own;
              times at all, in rounds with one floor that stays in memory
    captured  S2FT's step as one CUDA graph beside the floor's, at the smallest size
    depth     S2FT with the modules of the model and dx in full depth, at the largest size

The results are in FOLDER/<device>/steps.json, in the form of `pytest bench/steps`, but for bytes at
the other sizes; those of captured steps in captured.json. Each is written as soon as it is known,
and what is there from the same code is not measured again. Nothing is begun that should end after
the budget. Fails where anything failed; the rest is measured all the same.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import machine, results, timing
from bench.methods import Budget, Method, comparable
from bench.steps import step
from bench.steps.bench_steps import TIMING_LR, WARM_UP
from bench.steps.cases import FLOOR, FULL_DEPTH, Case
from bench.steps.compare import overview
from bench.steps.model_shapes import TABLE
from s2kernels import capture
from s2kernels.attention import torch_choice
from s2kernels.capturing import rehearsing
from s2kernels.causal_mask import no_needless_mask
from s2kernels.recording import Recorder

METHODS = (FLOOR, "s2ft_inplace", "lora", "full", "s2ft_permuted_inplace", "lora_fused")
SIZES = ((1, 512), (1, 2048), (2, 2048))  # sequences, their tokens
ROUNDS, MOST_ROUNDS, SECONDS = 8, 40, 3.0  # of each size

# Expected on an H200, before anything was measured there: of a token in a step of the floor (4 FLOP
# a parameter at 60 % of 790 TFLOP/s), of one in a step of full fine-tuning, which takes longest; of
# a build with its adapter; of compiling what S2FT launches.
FLOOR_TOKEN, TOKEN, BUILD, COMPILE = 55e-6, 90e-6, 6.0, 10.0

Run = Callable[[Tensor], list[float]]  # takes a step on a batch; seconds of its parts


@dataclass(frozen=True)
class Job:
    """What is measured with one build of a method: steps of cases, captured or not."""

    cases: tuple[Case, ...]  # the largest comes last
    captured: bool = False

    @property
    def name(self) -> str:
        method = self.cases[0].id.split("/")[3]
        sizes = ", ".join(f"{case.batch}x{case.length}" for case in self.cases)
        return f"{'captured steps' if self.captured else 'steps'} of {method} at {sizes}"

    def expected_seconds(self) -> float:
        """On an H200. Predicted, to decide whether there is time for it."""
        found = BUILD + (COMPILE if self.cases[0].method.startswith("s2ft") else 0)
        for tokens in (case.batch * case.length for case in self.cases):
            pair = tokens * (FLOOR_TOKEN + TOKEN)
            found += WARM_UP * pair + max(ROUNDS * pair, min(SECONDS, MOST_ROUNDS * pair))
        if not self.captured:  # another build, and steps with hooks, which take longer
            found += BUILD + 8 * tokens * TOKEN + 4
        return found


def jobs(toy: bool) -> list[Job]:
    """The most valuable first."""
    shape, dtype = (TABLE["toy"], "float32") if toy else (TABLE["llama-2-7b"], "bfloat16")
    sizes = [(batch, length // 64 if toy else length) for batch, length in SIZES]
    cases = {
        method: tuple(Case(("figure5", "tokens"), shape, *size, dtype, method) for size in sizes)
        for method in METHODS
    }
    deep = replace(cases["s2ft_inplace"][-1], suites=("depth",), method="s2ft_unfused")
    return [
        *(Job(cases[method]) for method in METHODS),
        Job(cases["s2ft_inplace"][:1], captured=True),
        Job((replace(deep, options=FULL_DEPTH),)),
    ]


class Files:
    """The two files of results."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        path = folder / machine.device_name(device)
        self.steps, self.captured = (
            results.Results(path / f"{name}.json", device) for name in ("steps", "captured")
        )

    def of(self, job: Job) -> results.Results:
        return self.captured if job.captured else self.steps

    def lack(self, job: Job) -> bool:
        """Whether any of what the job measures is missing."""
        return not all(self.of(job).has(fullname(case)) for case in job.cases)


def entry(case: Case, budget: Budget, stats: dict, found: dict) -> dict:
    """Of a measured case, as `pytest bench/steps` writes it."""
    known = {"total_parameters": case.shape.parameters(), "budget": asdict(budget)}
    return {
        "group": "/".join(case.id.split("/")[:3]),
        "name": f"bench_step[{case.id}]",
        "fullname": fullname(case),
        "params": case.params(),
        "stats": stats,
        "extra_info": known | found | {"status": "measured"},
    }


def fullname(case: Case) -> str:
    return f"bench/steps/bench_steps.py::bench_step[{case.id}]"


class Bench:
    """Does the jobs. The floor stays from one to the next."""

    def __init__(self, files: Files, device: torch.device) -> None:
        self.files, self.device = files, device
        self._floor: Method | None = None

    def do(self, job: Job) -> None:
        """Measures and writes what is missing of it."""
        largest, device = job.cases[-1], self.device
        budget = comparable(largest.shape.config(largest.length))
        machine.release(device)
        if self._floor is None:
            self._floor = step.build(largest.floor(), budget, device, TIMING_LR)
            for case in job.cases:
                print(torch_choice(self._floor.base, case.length))
        counted = {} if job.captured else step.count(largest, budget, device)
        machine.release(device)
        method = step.build(largest, budget, device, TIMING_LR)
        trained = {"trained_parameters": method.trained_parameters()}
        for case in job.cases:
            run = captured if job.captured else timed
            runs = [run(each, case, device) for each in (self._floor, method)]
            stats, found = time_together(*runs, case, device)
            step.check_loss(method, next(step.random_batches(case, device)))
            found |= trained | (counted if case is largest else {})
            self.files.of(job).add(entry(case, budget, stats, found))


def timed(method: Method, case: Case, device: torch.device) -> Run:
    return lambda batch: step.laps(method, batch, device)


def captured(method: Method, case: Case, device: torch.device) -> Run:
    replay = replayed(method, next(step.random_batches(case, device)), device)
    return lambda batch: timing.laps([lambda: replay(batch)], device)


def time_together(floor: Run, method: Run, case: Case, device: torch.device) -> tuple[dict, dict]:
    """Rounds of a step of each on one batch, either one first in turn: (stats, extra_info)."""
    batches = step.random_batches(case, device)
    for _ in range(WARM_UP):
        took = sum(floor(batch := next(batches))) + sum(method(batch))
    rounds = min(max(ROUNDS, int(SECONDS / took)), MOST_ROUNDS)
    floors, laps = [], []
    for number in range(rounds):
        batch = next(batches)
        if number % 2 == 0:
            floors.append(sum(floor(batch)))
        laps.append(method(batch))
        if number % 2 == 1:
            floors.append(sum(floor(batch)))
    return timing.stats([sum(each) for each in laps]), step.times(laps, floors)


def replayed(method: Method, like: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The step of `method` as one CUDA graph for batches like this one; a plain one on a CPU.

    By `s2kernels.capture`, or for the floor, which has no optimizer, by what that records with.
    """
    if device.type != "cuda":
        return method.step
    if method.optimizer is not None:
        for group in method.optimizer.param_groups:
            group["capturable"] = True
        whole = capture(
            method.model, method.optimizer, loss=lambda model, batch: method.loss(batch["ids"])
        )
        for _ in range(4):  # three to warm up; the next one is recorded
            whole({"ids": like})
        if not whole.replays:
            raise RuntimeError(f"no step of {method.name} was recorded: {whole.obstacle}")
        return lambda batch: whole({"ids": batch})
    held, recorder = like.clone(), Recorder(device)
    with rehearsing(), no_needless_mask(method.model):
        for _ in range(3):
            recorder.run(lambda: method.step(held))
        recording = recorder.record(lambda: method.step(held))

    def replay(batch: Tensor) -> Tensor:
        held.copy_(batch)
        recording.replay()
        return recording.result

    return replay


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    listed = jobs(args.toy)
    if args.plan:
        for job in listed:
            print(f"{job.expected_seconds():6.0f} s  {job.name}")
        return 0
    device, end = machine.default_device(), time.monotonic() + args.budget_s
    files = Files(args.results, device)
    bench, failed = Bench(files, device), False
    for job in filter(files.lack, listed):
        expected = 0.0 if args.toy else job.expected_seconds()
        rest = end - time.monotonic()
        if expected >= rest:
            print(f"no time for {job.name}: {expected:.0f} s expected, {max(rest, 0):.0f} s left")
            continue
        began = time.monotonic()
        try:
            bench.do(job)
        except Exception:
            failed = True
            traceback.print_exc()
            timing.synchronize(device)  # raises again what broke the GPU
            bench = Bench(files, device)  # gives all memory back
            machine.release(device)
        print(f"{job.name}: {time.monotonic() - began:.1f} s, expected {expected:.0f}", flush=True)
    for file in (files.steps, files.captured):
        print(overview(file.entries))
    if any(map(files.lack, listed)) and not failed:
        print("the budget is spent: the same command goes on with the rest")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps.few_builds", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--budget-s", type=float, default=340.0, help="seconds (default 340)")
    parser.add_argument("--plan", action="store_true", help="list the jobs, measure nothing")
    parser.add_argument("--toy", action="store_true", help="a rehearsal with a toy model")
    args = parser.parse_args(argv)
    if args.toy and args.results == results.FOLDER and not args.plan:
        parser.error("--toy needs --results: its numbers mean nothing")
    return args


if __name__ == "__main__":
    sys.exit(main())
