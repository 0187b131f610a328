"""The studies: which runs each of them needs. A phase may depend on the results of earlier ones."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.learning.protocol import FULL_RATES, HIGHER, RATES, SEEDS
from bench.learning.runs import DOWN, Run

# The entrants of study `learn`, in the order of their importance.
ENTRANTS = {
    "s2ft": Run("s2ft"),
    "lora": Run("lora"),
    "full": Run("full"),
    "s2ft down": Run("s2ft", projections=DOWN),
    "dora": Run("dora"),
    "shira": Run("shira"),
    "spiel": Run("spiel"),
}
MOMENTUM = Run("spiel_ma")
MOMENTUM_RATES = (1e-3, 3e-3, 1e-2)  # SM3 divides by a sum of squares, not by a mean
RANKS = (1, 4, 13)  # of the sweep over the trained share: LoRA on all linears has no less than 1
# About 0.1 % of the parameters: channels of each block; LoRA's rank on down_proj alone.
LEAST, LEAST_RANK = (1, 7), 2
STRATEGIES = ("weight", "activation", "product", "gradient")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSITIES = (0.001, 0.01, 0.05)

Find = Callable[[Run], dict | None]
Phases = Iterator[list[Run]]


def rates(run: Run) -> tuple[float, ...]:
    """The grid of learning rates of a method."""
    if run.method == "full":
        return FULL_RATES
    return MOMENTUM_RATES if run.method == "spiel_ma" else RATES


def best(entrant: Run, tried: tuple[float, ...], find: Find) -> float:
    """The rate of `tried` with the lowest validation loss at the first seed.

    Raises ValueError where one was not tried.
    """
    losses = {}
    for lr in tried:
        result = find(replace(entrant, lr=lr))
        if result is None:
            raise ValueError(
                f"the learning rate of {entrant.method} on {', '.join(entrant.projections)} is "
                "chosen by other runs first: python -m bench.learning learn"
            )
        losses[lr] = result["validation loss"]
    return min(losses, key=losses.__getitem__)


def beyond(entrants: list[Run], find: Find) -> list[Run]:
    """One more rate, where the best of the grid is its highest."""
    runs = []
    for entrant in entrants:
        grid = rates(entrant)
        if best(entrant, grid, find) == grid[-1]:
            runs.append(replace(entrant, lr=float(f"{HIGHER * grid[-1]:.6g}")))
    return runs


def tuned(entrant: Run, find: Find) -> Run:
    """`entrant` with the best rate of its grid and of what is beyond it."""
    tried = (*rates(entrant), *(run.lr for run in beyond([entrant], find)))
    return replace(entrant, lr=best(entrant, tried, find))


def grid(entrant: Run) -> list[Run]:
    return [replace(entrant, lr=lr) for lr in rates(entrant)]


def seeded(runs: list[Run]) -> list[Run]:
    """The runs at every seed but the first."""
    return [replace(run, seed=seed) for seed in SEEDS[1:] for run in runs]


def learn(find: Find) -> Phases:
    """1: every method at equal trained parameters; then S2FT and LoRA over the trained share."""
    entrants = list(ENTRANTS.values())
    for part in (entrants[:3], entrants[3:]):
        yield [Run("frozen"), *(run for entrant in part for run in grid(entrant))]
        yield beyond(part, find)
        yield seeded([tuned(entrant, find) for entrant in part])
    swept = [tuned(ENTRANTS[name], find) for name in ("s2ft down", "lora")]
    yield [replace(run, rank=rank) for rank in RANKS for run in swept]
    down, everywhere = swept
    yield [replace(down, units=LEAST), replace(everywhere, rank=LEAST_RANK, projections=DOWN)]


def channels(find: Find) -> Phases:
    """2: random channels, and those of largest and smallest score, in down_proj."""
    random = tuned(ENTRANTS["s2ft down"], find)
    names = [f"{s} {which}" for s in STRATEGIES for which in ("smallest", "largest")]
    runs = [random, *(replace(random, channels=name) for name in names)]
    yield runs
    yield seeded(runs)


def projections(find: Find) -> Phases:
    """3: one projection alone, with equal parameters: one head, or as many channels."""
    lr = tuned(ENTRANTS["s2ft down"], find).lr
    yield [Run("s2ft", lr, projections=(name,), units=(1, 64)) for name in PROJECTIONS]


def fusion(find: Find) -> Phases:
    """4: adapters of arithmetic and of choices, each alone and fused."""
    runs = []
    for name in ("s2ft down", "lora"):
        run = replace(tuned(ENTRANTS[name], find), kind="fuse", tasks=("math", "choice"))
        runs += [run] if run.method == "lora" else [run, replace(run, disjoint=True)]
    yield runs
    yield seeded(runs)


def sequential(find: Find) -> Phases:
    """5: three tasks after each other."""
    runs = []
    for name in ("s2ft down", "lora", "full"):
        run = replace(
            tuned(ENTRANTS[name], find), kind="sequence", tasks=("math", "choice", "docs")
        )
        runs += [run] if run.method != "s2ft" else [run, replace(run, disjoint=True)]
    yield runs


def spiel(find: Find) -> Phases:
    """7: what grows, whether anything should be replaced, and the density."""
    grown = [ENTRANTS["spiel"], MOMENTUM]
    yield [run for rule in grown for run in grid(rule)]
    yield beyond(grown, find)
    accumulated, momentum = tuned(ENTRANTS["spiel"], find), tuned(MOMENTUM, find)
    runs = [accumulated, replace(accumulated, replace=False), momentum]
    runs.append(replace(momentum, replace=False))
    yield runs
    yield seeded(runs)
    yield [replace(accumulated, density=density) for density in DENSITIES]


def overlap(find: Find) -> Phases:
    """6: which channels the scores choose on each task, and what a full update does in them."""
    full = tuned(ENTRANTS["full"], find)
    yield [replace(full, kind="overlap", tasks=("math", "choice", "docs"))]


def memory(find: Find) -> Phases:
    """7, without training: whether gradients are local, and bytes per trained entry."""
    kinds = [Run("spiel", kind="locality")]
    for method in ("spiel", "spiel_ma"):
        kinds += [Run(method, 1e-3, kind="bytes", density=density) for density in DENSITIES]
    yield kinds


STUDIES: dict[str, Callable[[Find], Phases]] = {
    study.__name__: study
    for study in (learn, channels, projections, fusion, sequential, overlap, spiel, memory)
}
