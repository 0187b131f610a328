"""What a machine with a CUDA GPU measures in ten minutes, the most valuable first.

    bench/gpu.sh OUT_DIR [--budget-s 570] [--plan] [--rehearse]

    check   steps of S2FT end to end, in bf16; where they are wrong, all ends
    steps   of LLaMA-2-7B by every core method, and captured (bench.steps.few_builds)
    tune    the launches of slice_grad (bench.kernels.tune)
    tests   of the kernels and of what calls them, compiled: those in bf16 first

Each part ends by its share of the budget; what one leaves, the next ones have. Everything is
written to OUT_DIR as soon as it is known. The same command with the same OUT_DIR, and another
budget, goes on where the last one stopped, on another machine too. It fails where a test, a launch
or a step failed.

    OUT_DIR/tries.txt    a line for each try of a part, or of a file of tests
    OUT_DIR/log.txt      what all parts said
    OUT_DIR/<device>/    tune.json, steps.json, captured.json: for bench/results/<device>/
    OUT_DIR/tuned.json   s2kernels/kernels/tuned.json with the launches that were found: to be
                         committed. It is in that place for whatever is measured after.
    OUT_DIR/results.tar  all of these, written however a run ends; an OUT_DIR may begin from it

--plan says what would be done, and starts nothing. --rehearse does the same with a toy model and
toy shapes, within the same budget, GPU or not. Needs torch, triton, transformers, peft, pytest,
pytest-benchmark, tqdm and coreutils; no network and no installation.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUNED = ROOT / "s2kernels" / "kernels" / "tuned.json"
BUDGET = 570.0
# Seconds of BUDGET. The check has twice what is predicted: the first imports are from a cold disk.
SHARES = {"check": 90, "steps": 320, "tune": 60, "tests": 100}
STARTING = 15.0  # seconds that the imports of a part may take, and what it began last
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]

# (file, expression of pytest's -k)
CHECK = [("tests/peft/test_bf16_steps.py", "")]
TOY_CHECK = [("tests/peft/test_bf16_steps.py", "inplace-permute-12")]
TOY_TESTS = [("tests/kernels/test_swiglu_kernel.py", "float16")]
# What a step of S2FT launches, and what calls it; then other kernels.
FILES = (
    *(f"kernels/test_{name}_kernel" for name in ("slice_grad", "slice_write", "swiglu")),
    *(f"autograd/test_autograd_{name}" for name in ("layers", "linear", "mlp", "joined")),
    *("core/test_captured_step", "core/test_step_in_backward"),
    *("core/test_fast_ops", "core/test_attention"),
    *(f"kernels/test_{name}_kernel" for name in ("linear", "fused_linear", "slice_linear")),
    *(f"kernels/test_{name}_kernel" for name in ("slice_grad_each", "adamw", "sparse_write")),
)
TESTS = [(f"tests/{file}.py", words) for words in ("bfloat16", "not bfloat16") for file in FILES]


@dataclass
class Run:
    """One call of the campaign.

    failed      whether anything was wrong
    unfinished  the parts, and files of tests, that are to go on in another call
    stopped     whether somebody ended it
    """

    out: Path
    rehearse: bool
    began: float
    budget: float
    failed: bool = False
    unfinished: list[str] = field(default_factory=list)
    stopped: bool = False
    _children: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rest(self, part: str) -> float:
        """Seconds that are left to a part: those of its own, and what the ones before it left."""
        names = list(SHARES)
        share = sum(SHARES[name] for name in names[: names.index(part) + 1])
        end = self.began + self.budget * share / BUDGET
        return end - time.monotonic()

    def do(self, name: str, seconds: float, *arguments: str, **variables: str) -> tuple[int, str]:
        """Runs python3 with arguments, for so many seconds at most: (exit status, what it said).

        Its status is 124 where it was stopped, or not begun for want of time.
        """
        self.say(f"== {name}")
        if seconds <= 0 or self.stopped:
            self.say(f"== {name}: no time")
            return 124, ""
        began = time.monotonic()
        # `timeout` ends all that the child started: first asked, ten seconds later killed.
        child = subprocess.Popen(
            ["timeout", "--kill-after=10", f"{seconds:.1f}"]
            + [os.environ.get("PYTHON", sys.executable), *arguments],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._children.add(child)
        said = []
        for line in child.stdout:
            said.append(line)
            self.say(line.rstrip("\n"))
        status = child.wait()
        self._children.discard(child)
        self.say(f"== {name}: {time.monotonic() - began:.0f} s")
        status = 124 if status == 137 or self.stopped else status
        if status not in (0, 5):  # 5: pytest had nothing to do
            self.say(f"== {name}: {'not finished' if status == 124 else f'FAILED, {status}'}")
            self.failed |= status != 124
        return status, "".join(said)

    def say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            with (self.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{line}\n")

    def stop(self, *signal_: object) -> None:
        """Ends all that runs."""
        self.stopped = True
        for child in list(self._children):
            child.terminate()

    def measure(self, part: str, *arguments: str, **variables: str) -> None:
        """A command that writes results, and is told how long it has, unless it has them all."""
        if self.has(part):
            return
        rest = self.rest(part)
        budget = f"{max(0.0, rest - STARTING):.0f}"
        paths = ["--results", str(self.out), "--budget-s", budget]
        status, said = self.do(part, rest, *arguments, *paths, **variables)
        is_late = "the budget is spent" in said or "s are spent" in said
        self.note(part, 124 if status == 0 and is_late else status)

    def test(self, part: str, files: list[tuple[str, str]]) -> None:
        """Runs those of the (file, expression of pytest's -k) that have not passed, several at a
        time, as most of their time goes into compiling on the CPU.
        """

        def one(file: str, words: str) -> None:
            name = f"{file}[{words.replace(' ', '-')}]" if words else file
            if not self.has(name):
                chosen = ["-k", words] if words else []
                self.note(name, self.do(name, self.rest(part), *PYTEST, *chosen, file)[0])

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) * 2 // 3)) as pool:
            list(pool.map(lambda each: one(*each), files))  # raises what a call raises

    def has(self, name: str) -> bool:
        """Whether this was done to the end, without failures, with the sources as they are."""
        path = self.out / "tries.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        last = dict(line.split(" ", 1) for line in lines)
        return last.get(name) in (f"passed {sources()}", f"skipped {sources()}")

    def note(self, name: str, status: int) -> None:
        """Writes down what came of it."""
        how = {0: "passed", 5: "skipped", 124: "unfinished"}.get(status, "failed")
        with self._lock, (self.out / "tries.txt").open("a") as out:
            out.write(f"{name} {how} {sources()}\n")
        if how == "unfinished":
            self.unfinished.append(name)


@cache
def sources() -> str:
    """A hash of all code. What the tuner writes is no part of it."""
    digest = hashlib.sha256()
    for folder in ("s2kernels", "autograd", "bench", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def campaign(run: Run) -> None:
    """All parts. A rehearsal without a GPU runs the kernels in Triton's interpreter."""
    toy = ["--toy"] if run.rehearse else []
    table = run.out / "tuned.json"
    if not table.exists():
        shutil.copyfile(TUNED, table)
    elif not run.rehearse:
        shutil.copyfile(table, TUNED)
    run.test("check", TOY_CHECK if toy else CHECK)
    if run.failed:
        run.say("== steps of S2FT are wrong: all else is left")
        run.unfinished += [part for part in SHARES if part != "check"]
        return
    run.measure("steps", "-m", "bench.steps.few_builds", *toy)

    interpreted = run.rehearse and shutil.which("nvidia-smi") is None
    variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
    run.measure(
        *("tune", "-m", "bench.kernels.tune", "--ops", "slice_grad", "--table", str(table)),
        *toy,
        **variables,
    )
    if not run.rehearse:
        shutil.copyfile(table, TUNED)
    run.test("tests", TOY_TESTS if toy else TESTS)


def plan(budget: float) -> list[str]:
    """A line for each part, and for what is measured in it: seconds at most, and predicted."""
    from bench.kernels.candidates import candidates, problems
    from bench.steps import few_builds

    steps = {job.name: job.expected_seconds() for job in few_builds.jobs(toy=False)}
    tuned = problems(["slice_grad"], toy=False)
    # SPLITS is an argument at run time, and no program of its own
    launches = [candidates(problem, toy=False) for problem in tuned]
    compiled = sum(len({str(each | {"SPLITS": 0}) for each in of_one}) for of_one in launches)
    lines = ["at most  predicted for an H200 with 16 cores, with imports"]

    def part(name: str, seconds: float, words: str) -> None:
        lines.append(f"{SHARES[name] * budget / BUDGET:5.0f} s  {seconds:5.0f} s  {name}: {words}")

    part("check", 45, " ".join(name for name, _ in CHECK))
    part("steps", STARTING + sum(steps.values()), "LLaMA-2-7B in bf16")
    lines += [f"         {seconds:5.0f} s    {name}" for name, seconds in steps.items()]
    seconds = STARTING + compiled / 16 + len(tuned)  # a second for timing each
    part("tune", seconds, f"slice_grad, {len(tuned)} problems, {compiled} programs to compile")
    part("tests", SHARES["tests"], "as many as there is time for, some at a time")
    lines += [f"                    {name}" for name in dict.fromkeys(name for name, _ in TESTS)]
    lines.append("What there was no time for is left to the same command with the same OUT_DIR.")
    return lines


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.plan:
        print("\n".join(plan(args.budget_s)))
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    packed = out / "results.tar"
    if packed.exists() and not (out / "tries.txt").exists():
        with tarfile.open(packed) as tar:
            tar.extractall(out, filter="data")
    run = Run(out, args.rehearse, time.monotonic(), args.budget_s)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, run.stop)
    try:
        campaign(run)
    finally:
        left = " ".join(dict.fromkeys(run.unfinished))
        took = time.monotonic() - run.began
        run.say(f"== {took:.0f} s; results in {out}")
        run.say(f"== run again; not finished: {left}" if left else "== nothing is left")
        pack(out)
    return 143 if run.stopped else int(run.failed)


def pack(out: Path) -> None:
    """Writes results.tar of all that is in the folder."""
    packed = out / "results.tar"
    new = packed.with_suffix(".new")
    with tarfile.open(new, "w") as tar:
        for path in sorted(out.iterdir()):
            if path not in (packed, new):
                tar.add(path, path.name)
    new.replace(packed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT_DIR", type=Path, nargs="?")
    parser.add_argument("--budget-s", type=float, default=BUDGET, help="seconds (default 570)")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and no more")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, GPU or not")
    args = parser.parse_args(argv)
    if args.out is None and not args.plan:
        parser.error("OUT_DIR is missing")
    return args


if __name__ == "__main__":
    sys.exit(main())
