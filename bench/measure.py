"""One case, measured: bytes and operators of a fresh model, then times beside a fresh floor.

The two do not share a model, so what the counting does to the allocator is in no time, and peaks
are of a method that is alone on the device.
"""

from dataclasses import asdict
from math import inf

import torch

from bench import counts, memory, report, roofline, rounds, visits
from bench.cases import FLOOR, Case
from bench.fresh import Setup, WrongMethod, build, out_of_memory, random_batches, release
from bench.methods import METHODS, Budget, Method, Unavailable, comparable
from bench.projections import PROJECTIONS
from bench.visits import Visit

STEADY_STEPS = 3  # whose highest peak is the peak of a step
# Where every trained number should move, norms of bf16 ones too.
COUNTING_LR = 1e-2
# A reason of activations.not_covered.
NOT_CHECKED = "what attention keeps on CUDA was not checked"


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
        "source": report.source_hash(),
        "total_parameters": case.shape.parameters(),
        "budget": asdict(budget),
        "model": predict(case, budget, setup),
    }
    visit = None
    try:
        METHODS[case.method].check(setup.device, case.options)
        extra |= count(case, budget, setup.device)
        extra["model"] = checked(extra["model"], extra["bytes"]["saved"])
        release(setup.device)
        visit = rounds.visit(case, budget, setup) if case.timed else None
    except Unavailable as reason:
        extra["status"] = f"unavailable: {reason}"
    except Exception as error:
        if not out_of_memory(error):
            raise
        extra["status"] = "out of memory"
    release(setup.device)
    return entry(case, visit, extra)


def visit_again(case: Case, setup: Setup, limit: float) -> Visit:
    """One more visit to a case that was measured.

    Raises Disturbed where the floor takes longer than `limit` seconds, and whatever goes wrong.
    """
    release(setup.device)
    budget = comparable(case.shape.config(case.length), share=case.share)
    visit = rounds.visit(case, budget, setup, limit)
    release(setup.device)
    return visit


def entry(case: Case, visit: Visit | None, extra: dict) -> dict:
    """The entry of `case` in pytest-benchmark's JSON; `extra` is its extra_info, without times."""
    entry = {
        "group": case.suite,
        "name": case.id,
        "fullname": case.fullname,
        "params": case.params(),
        "stats": None,
        "extra_info": extra,
    }
    return entry if visit is None else visits.summed_up(visits.with_visit(entry, visit), inf)


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
        "launches": None,  # of `launches`, which is called after all times
    }


def launches(case: Case, setup: Setup) -> int | None:
    """CUDA kernels that a step launches; None without CUDA.

    Not a part of `count`: a process may be slower for good once it has been profiled.
    """
    release(setup.device)
    budget = comparable(case.shape.config(case.length), share=case.share)
    method = build(case, budget, setup.device, COUNTING_LR)
    batches = random_batches(case, setup.device)
    for _ in range(rounds.WARM_UP):
        method.step(next(batches))
    return counts.launches(lambda: method.step(next(batches)), setup.device)


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
