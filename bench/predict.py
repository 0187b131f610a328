"""What a training step should cost on a GPU: FLOPs, bytes, memory and time, predicted.

    python -m bench.predict [--model llama-2-7b ...] [--tokens 4096] [--gpu H200 A100]

Nothing is measured, and no GPU is needed. `bench.steps.counting` runs the real code of the methods
without computing anything, on models of two depths. The counts are continued to the whole depth:
all layers are alike, so a straight line through two depths is exact. The bytes alive are continued
for each phase of the step, and the peak is the highest of them. (LISA's peak may be a little off:
it depends on which layers were drawn.)

Time: every operator takes the longer of two times, its FLOPs at the rate of a large matrix product
and its bytes at the rate of a large copy. Operators run one after another. A step of few tokens is
slower: caches, idle multiprocessors, launches and Python are left out. So is what is not done in
every step: GaLore's SVD, and the gradients that SpIEL watches and the entries that it replaces.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import memory, results
from bench.methods import METHODS, Budget, Method, Unavailable, comparable
from bench.methods.spiel import SpIEL
from bench.steps.cases import FLOOR, Case
from bench.steps.counting import DryRun, dry_run
from bench.steps.model_shapes import TABLE, Shape
from bench.steps.step import build
from bench.steps.work import GPUS, Ceilings
from s2kernels.cli.options import COUNT


@dataclass(frozen=True)
class Prediction:
    """A step of a method at full depth.

    trained    numbers that it trains
    kernels    (FLOPs, bytes, dtype) -> how often; a continued count may be negative
    saved      bytes that autograd keeps for the backward; unseen: others that the forward leaves
    peaks      phase of the step -> the most bytes alive, weights included
    updating   bytes that the optimizer moves, which are in kernels, too
    """

    trained: int
    kernels: Counter[tuple[int, int, str]]
    saved: int
    unseen: int
    peaks: dict[str, int]
    updating: int

    @property
    def flops(self) -> int:
        """Of matrix products and of attention at or below the diagonal."""
        return sum(flops * times for (flops, _, _), times in self.kernels.items())

    @property
    def bytes(self) -> int:
        return sum(nbytes * times for (_, nbytes, _), times in self.kernels.items())

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(ceilings.seconds(*kernel) * times for kernel, times in self.kernels.items())


def predict(case: Case, budget: Budget, device: str = "cuda") -> Prediction:
    """A step of `case` on a batch, in a model of the whole depth.

    device: "cuda" for the kernels that run on a GPU, "cpu" for plain torch, with which what is
    saved is to the byte what a step on a CPU saves.

    Raises Unavailable as the method does.
    """
    shape = case.shape
    few = max(2, budget.lisa_layers) if case.method == "lisa" else 2
    if shape.layers <= few + 1:
        return counted(case, budget, device)
    cuts = (replace(case, shape=shape.cut(n, shape.vocab)) for n in (few, few + 1))
    low, high = (vars(counted(cut, budget, device)) for cut in cuts)

    def line(a: Any, b: Any) -> Any:
        if isinstance(a, int):
            return a + (shape.layers - few) * (b - a)
        # A phase that only the deeper one has is no peak.
        keys = a.keys() | b.keys() if isinstance(a, Counter) else a.keys() & b.keys()
        return type(a)({key: line(a[key], b[key]) for key in keys})

    return Prediction(**line(low, high))


def counted(case: Case, budget: Budget, device: str) -> Prediction:
    """A step as `predict` takes it, run in a model of all the layers of the case's shape.

    It is the second step: in the first one the states of the optimizer are made.
    """
    with dry_run(device) as run:
        method = build(case, budget, torch.device("cpu"), lr=1e-3)
        tokens = torch.zeros(case.batch, case.length, dtype=torch.int64)
        _mark_layers(method, run)
        if isinstance(method, SpIEL):  # past the steps in which it watches gradients
            method.tuner.resume(method.config.accumulation_steps + 1, {}, {})
        method.step(tokens)
        run.forget()
        method.zero_grad()
        run.phase = "forward"
        losses: list[Tensor] = []

        def forward() -> Tensor:
            losses.append(method.loss(tokens))
            return losses[0]

        kept = memory.kept_by(forward, method.model)
        run.phase = "head"
        losses.pop().backward()
        run.phase = "optimizer"
        method.update()
        updating = sum(nbytes * n for (_, nbytes, _), n in run.kernels["optimizer"].items())
        kernels = sum(run.kernels.values(), Counter())
        trained = method.trained_parameters()
        return Prediction(trained, kernels, kept.saved, kept.unseen, dict(run.peaks), updating)


def _mark_layers(method: Method, run: DryRun) -> None:
    """Makes the backward set the phase of `run`: the last layer, the first, or one between them."""
    layers = method.base.model.layers
    for number, layer in enumerate(layers):
        phase = {0: "first layer", len(layers) - 1: "last layer"}.get(number, "layers")

        def mark(layer, args, output, phase=phase):
            if output.requires_grad:
                output.register_hook(lambda dy: setattr(run, "phase", phase))

        layer.register_forward_hook(mark)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    ceilings = [GPUS[name] for name in args.gpu]
    if args.ceiling is not None:
        half, copied = args.ceiling
        ceilings.append(Ceilings(f"{half:g} TFLOP/s", {"bfloat16": half * 1e12}, copied * 1e12))
    for name in args.model:
        print(f"{name}, {args.sequences} x {args.tokens} tokens, {args.dtype}: predictions")
        print(results.table(_rows(TABLE[name], ceilings, args)))
    for each in ceilings:
        print(
            f"{each.name}: {each.rate(args.dtype) / 1e12:g} TFLOP/s, {each.bytes / 1e12:g} TB/s. "
            f"ms: predicted, not measured; x: over the frozen floor"
        )
    return 0


def _rows(shape: Shape, ceilings: list[Ceilings], args: argparse.Namespace) -> list[list[str]]:
    """The names of the columns, then a row for each method that can run here."""
    budget = comparable(shape.config(args.tokens), rank=args.rank)
    case = Case((), shape, args.sequences, args.tokens, args.dtype, FLOOR)
    floor = predict(case, budget)
    rows = [["method", "trained M", "TFLOP", "moved GB", "saved GiB", "peak GiB"]]
    rows[0] += [cell for each in ceilings for cell in (f"{each.name} ms", "x")]
    for name in args.methods:
        try:
            found = floor if name == FLOOR else predict(replace(case, method=name), budget)
        except Unavailable as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        row = [name, f"{found.trained / 1e6:.2f}", f"{found.flops / 1e12:.2f}"]
        row.append(f"{found.bytes / 1e9:.1f}")
        row += [f"{size / 2**30:.2f}" for size in (found.saved, found.peak)]
        for each in ceilings:
            seconds = found.seconds(each)
            row += [f"{seconds * 1e3:.1f}", f"{seconds / floor.seconds(each):.3f}"]
        rows.append(row)
    return rows


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    dtypes = ("bfloat16", "float16", "float32")
    add("--model", nargs="+", choices=list(TABLE), default=["llama-2-7b"], metavar="MODEL")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    add("--tokens", type=COUNT, default=4096, help="of a sequence (default 4096)")
    add("--sequences", type=COUNT, default=1, help="of a batch (default 1)")
    add("--dtype", choices=dtypes, default="bfloat16", help="of the model (default bfloat16)")
    add("--rank", type=COUNT, default=16, help="of LoRA, and as much of the rest (default 16)")
    add("--gpu", nargs="*", choices=list(GPUS), default=list(GPUS), help="whose rates to take")
    add("--ceiling", nargs=2, type=float, metavar=("TFLOPS", "TBS"), help="rates of another one")
    parser.epilog = f"models: {', '.join(TABLE)}; methods: {', '.join(METHODS)}"
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
