"""One case, measured: bytes and operators of a fresh model, then times beside a fresh floor.

The two do not share a model, so what the counting does to the allocator is in no time, and peaks
are of a method that is alone on the device. Tokens are random, a new batch every timed step.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench import counts, memory, roofline, timing
from bench.cases import FLOOR, Case
from bench.methods import METHODS, Budget, Method, Unavailable, comparable
from bench.projections import PROJECTIONS

STEADY_STEPS = 3  # whose highest peak is the peak of a step
WARM_UP = 2  # steps before the clock: compilation, first allocations, the optimizer's state
# Of the counting, where every trained number should move, norms of bf16 ones too, and of the
# timing, where the model should stay what it is however many rounds there are.
COUNTING_LR, TIMING_LR = 1e-2, 1e-6
PERIODIC_STEPS, PERIODIC_SECONDS = 3, 5.0  # of periodic work: so many, but none after so long
PARTS = ("forward", "backward", "optimizer")
# A reason of activations.not_covered.
NOT_CHECKED = "what attention keeps on CUDA was not checked"
# In RuntimeErrors: of torch's allocator on a CPU, and of what takes memory past that on a GPU.
NO_MEMORY = (
    *("DefaultCPUAllocator", "CUDA error: out of memory"),
    *("Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


class WrongMethod(RuntimeError):
    """A method does not do what it says; its cost would say nothing."""


@dataclass
class Setup:
    """Where and how exactly to measure."""

    device: torch.device
    precision: timing.Precision
    ceilings: dict | None = None  # of bench.ceilings; None: no prediction


@dataclass(frozen=True)
class Times:
    """Seconds of every timed step, its share of periodic work in them, and the parts of a step.

    ratios: to the floor's step in the same round if paired, else to the floor's median.
    """

    seconds: list[float]
    ratios: list[float]
    parts: dict[str, float]  # medians; "periodic" is the share of one step
    paired: bool


def measure(case: Case, setup: Setup) -> dict:
    """The entry of `case` in the JSON. Running out of memory is a result, and so is Unavailable.

    Raises WrongMethod for a method that does not train what it says, and whatever else goes wrong.
    """
    release(setup.device)
    if case.options.compile:
        torch.compiler.reset()  # else earlier models count against the limit of recompilations
    budget = comparable(case.shape.config(case.length), share=case.share)
    extra: dict = {
        "status": "measured",
        "total_parameters": case.shape.parameters(),
        "budget": asdict(budget),
        "model": predict(case, budget, setup),
    }
    times = None
    try:
        METHODS[case.method].check(setup.device, case.options)
        extra |= count(case, budget, setup.device)
        extra["model"] = checked(extra["model"], extra["bytes"]["saved"])
        release(setup.device)
        times = time_beside_floor(case, budget, setup)
    except Unavailable as reason:
        extra["status"] = f"unavailable: {reason}"
    except Exception as error:
        if not out_of_memory(error):
            raise
        extra["status"] = "out of memory"
    release(setup.device)
    return entry(case, times, extra)


def entry(case: Case, times: Times | None, extra: dict) -> dict:
    """The entry of `case` in pytest-benchmark's JSON; `extra` is its extra_info, without times."""
    if times is not None:
        extra = extra | {
            "ratio_to_floor": timing.quartiles(times.ratios),
            "seconds": times.parts,
            "tokens_per_second": case.tokens / statistics.median(times.seconds),
            "paired": times.paired,
        }
    return {
        "group": case.suite,
        "name": case.id,
        "fullname": case.fullname,
        "params": case.params(),
        "stats": None if times is None else timing.stats(times.seconds),
        "extra_info": extra,
    }


def predict(case: Case, budget: Budget, setup: Setup) -> dict | None:
    """What `bench.roofline` expects of the case; None for a method that it does not know."""
    if setup.ceilings is None or case.method not in PROJECTIONS:
        return None
    sizes = (case.shape, case.batch, case.length, case.dtype)
    expected = roofline.predict(
        *sizes, case.method, budget, case.options, setup.ceilings, setup.device.type
    )
    names = ("seconds", "seconds_parts", "peak", "saved", "fits")
    return {name: getattr(expected, name) for name in names}


def checked(model: dict | None, saved: int | None) -> dict | None:
    """`model`, without the doubt of what attention keeps where it says what was measured."""
    if model is None or model["saved"] != saved:
        return model
    reasons = [reason for reason in (model["fits"] or "").split("; ") if reason != NOT_CHECKED]
    return model | {"fits": "; ".join(reasons) or None}


def build(case: Case, budget: Budget, device: torch.device, lr: float) -> Method:
    """The method of `case` at work on a fresh model."""
    dtype = getattr(torch, case.dtype)
    model = case.shape.build(case.length, dtype, device, seed=budget.seed)
    return METHODS[case.method](model, budget, lr, case.options)


def random_batches(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Batches of random tokens, int64 (batch, length), without end."""
    generator = torch.Generator().manual_seed(1)
    while True:
        size = (case.batch, case.length)
        yield torch.randint(case.shape.vocab, size, generator=generator).to(device)


def count(case: Case, budget: Budget, device: torch.device) -> dict:
    """Bytes, operators and trained parameters of a step, in a model of its own.

    peak is the highest of STEADY_STEPS steps after the first, first_step_peak that of the first, in
    which the optimizer's state is made after the activations have gone. Both are all the bytes
    alive, weights included. saved and unseen are what waits for the backward (`memory.kept_by`),
    gradients and optimizer what is alive after a step.

    temporaries = peak - weights - optimizer - max(saved, gradients): what is alive at the peak
    besides the weights, the optimizer's state and the larger of the two that come and go within a
    step. So it has in it the part of the smaller one that is alive at the peak.

    Under torch.compile, which the tools of saved and ops would switch off, these are None.
    """
    batches = random_batches(case, device)
    made: list[Method] = []
    before: dict[str, int] = {}

    def construct() -> None:
        made.append(build(case, budget, device, COUNTING_LR))
        before.update(checksums(made[0]))
        if bool(before) != (case.method != FLOOR):
            raise WrongMethod(f"{case.method} trains {', '.join(before) or 'nothing'}")

    batch = next(batches)
    steps = [lambda: made[0].step(batch)] * (1 + STEADY_STEPS)
    _, first, *steady = memory.peaks([construct, *steps], device)
    method = made[0]
    check_training(method, before)

    compiled = case.options.compile
    weights = memory.total_bytes(memory.model_tensors(method.model))
    method.zero_grad()
    kept = None if compiled else memory.kept_by(lambda: method.loss(batch), method.model)
    method.backward(method.loss(batch))
    gradients = memory.total_bytes(memory.gradients(method.model))
    optimizer = memory.total_bytes(method.state_tensors())
    held = max(0 if kept is None else kept.saved, gradients)
    return {
        "trained_parameters": method.trained_parameters(),
        "bytes": {
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "saved": None if kept is None else kept.saved,
            "unseen": None if kept is None else kept.unseen,
            "temporaries": max(steady) - weights - optimizer - held,
            "peak": max(steady),
            "first_step_peak": first,
        },
        "ops": None if compiled else counts.operators(lambda: method.step(batch)),
        "launches": counts.launches(lambda: method.step(batch), device),
    }


def checksums(method: Method) -> dict[str, int]:
    """A number for the bits of every trained parameter, by its name."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(parameter.detach().view(integers[parameter.itemsize]).sum())
        for name, parameter in method.named_trained()
    }


def check_training(method: Method, before: dict[str, int]) -> None:
    """Raises WrongMethod unless every parameter that was trained has moved since `before`."""
    after = checksums(method)
    still = [name for name, bits in before.items() if after.get(name) == bits]
    if still:
        raise WrongMethod(
            f"{method.name} trains {len(before) - len(still)} of its {len(before)} parameters; "
            f"not {', '.join(still[:3])}" + (", ..." if still[3:] else "")
        )


def time_beside_floor(case: Case, budget: Budget, setup: Setup) -> Times:
    """Times of `case` in rounds with a floor of its own, or alone where two models do not fit."""
    try:
        times, floor = time_rounds([case, case.floor()], budget, setup)
        paired = True
    except Exception as error:
        if not out_of_memory(error):
            raise
        paired = False
    if paired:
        ratios = timing.paired_ratios(times.seconds, floor.seconds)
        return Times(times.seconds, ratios, times.parts, paired)
    release(setup.device)  # not in the handler: its traceback keeps the two models alive
    # Right before, each time: the clocks of a device are not what they were some cases ago.
    (floor,) = time_rounds([case.floor()], budget, setup)
    release(setup.device)
    (times,) = time_rounds([case], budget, setup)
    reference = statistics.median(floor.seconds)
    return Times(times.seconds, [s / reference for s in times.seconds], times.parts, paired)


@dataclass(frozen=True)
class _Run:
    seconds: list[float]
    parts: dict[str, float]


def time_rounds(cases: list[Case], budget: Budget, setup: Setup) -> list[_Run]:
    """Fresh models of `cases` take a step each a round, on one batch, until setup.precision.

    What decides is the ratio of the first to the last, or the seconds of one alone. Steps with
    periodic work are made and not timed: `periodic_share` has it.
    """
    device = setup.device
    methods = [build(case, budget, device, TIMING_LR) for case in cases]
    batches = random_batches(cases[0], device)
    for _ in range(WARM_UP):
        batch = next(batches)
        for method in methods:
            step_laps(method, batch, device)

    laps: list[list[list[float]]] = [[] for _ in methods]
    places = [str(place) for place in range(len(methods))]
    began = time.perf_counter()
    decisive: list[float] = []
    while not setup.precision.reached(decisive, time.perf_counter() - began):
        batch = next(batches)
        if due := [method for method in methods if method.is_due()]:
            for method in due:
                method.step(batch)
            continue
        for place in map(int, timing.order(places, len(decisive))):
            laps[place].append(step_laps(methods[place], batch, device))
        first, last = sum(laps[0][-1]), sum(laps[-1][-1])
        decisive.append(first / last if len(methods) > 1 else first)
    if not bool(torch.isfinite(methods[0].loss(batch))):
        raise WrongMethod(f"the loss of {methods[0].name} is not finite after its timed steps")
    return [
        summary(of_steps, periodic_share(method, of_steps, batches, device))
        for method, of_steps in zip(methods, laps, strict=True)
    ]


def step_laps(method: Method, batch: Tensor, device: torch.device) -> list[float]:
    """One step of `method`; seconds of zeroing, forward, backward, update."""
    loss: list[Tensor] = []
    parts: list[Callable[[], object]] = [
        method.zero_grad,
        lambda: loss.append(method.loss(batch)),
        lambda: method.backward(loss.pop()),
        method.update,
    ]
    return timing.laps(parts, device)


def periodic_share(
    method: Method, laps: list[list[float]], batches: Iterator[Tensor], device: torch.device
) -> float:
    """Seconds of a step that go to what the method does every `period` steps only."""
    if method.period is None:
        return 0.0
    usual = statistics.median(map(sum, laps))
    due: list[float] = []
    while len(due) < PERIODIC_STEPS and sum(due) < PERIODIC_SECONDS:
        method.make_due()
        due.append(sum(step_laps(method, next(batches), device)))
    return max(0.0, statistics.median(due) - usual) / method.period


def summary(laps: list[list[float]], periodic: float) -> _Run:
    medians = [statistics.median(of_part) for of_part in zip(*laps, strict=True)]
    zeroing, forward, backward, update = medians
    parts = dict(zip(PARTS, (forward, backward, zeroing + update), strict=True))
    return _Run([sum(lap) + periodic for lap in laps], parts | {"periodic": periodic})


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that the memory of the device is too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def release(device: torch.device) -> None:
    """Gives back what earlier cases held: models are cycles, which only the collector frees."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
