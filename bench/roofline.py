"""What a step should cost: seconds and bytes, predicted from sizes and two measured rates.

The rates are those of `bench.ceilings`: FLOP/s of a large square matrix product in each dtype, and
bytes read and written per second by a large copy. Every kernel of `bench.activations.walk` takes
the longer of its FLOPs at the first and its bytes at the second, one after another. So the model
assumes

- that a product of any form reaches the rate of a large square one. A skinny one (an adapter, few
  tokens) is bound by its bytes, which the model sees, and by idle cores, which it does not;
- that attention reaches that rate too, on the half of the scores below the diagonal;
- that nothing stays in a cache from one kernel to the next: a pointwise operator of eager PyTorch
  reads and writes all of its operands. Sizes that fit a cache run faster than this;
- that a kernel costs nothing beside its work: no launches, no Python.

A measured step above the prediction has room; a step below it had its operands in a cache.
`Prediction.fits` names what a prediction leaves out altogether.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bench import entries
from bench.activations import not_covered, walk
from bench.ledger import Kernel, Ledger, Value
from bench.methods import Budget, Options
from bench.steps.model_shapes import Shape

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
OWN_WEIGHTS = ("frozen", "full", "lisa", "galore")  # methods that add no parameters
SPARSE = ("spiel", "spiel_ma")  # methods that train scattered entries
IN_PLACE = ("s2ft_inplace", "s2ft_unfused")  # methods that keep the weights under their slices
# What the seconds of a method leave out.
NOT_COUNTED = {
    "galore": "the singular value decompositions are not counted",
    "loreft": "the small kernels of the orthogonal map are not counted",
    "spiel": "watching gradients and replacing entries is not counted",
    "spiel_ma": "replacing entries is not counted",
}
# Launching a kernel from eager PyTorch, seconds: an assumption, used only to say where a step is
# bound by that.
LAUNCH = {"cpu": 3e-6, "cuda": 5e-6}


@dataclass(frozen=True)
class Prediction:
    """One step of a method.

    seconds_parts  "forward", "backward", "optimizer"; their sum is `seconds`
    seconds_by_part  the same sum by what it is spent on: "linear", "attention", "norm", ...
    bytes_parts    "weights", "gradients", "optimizer", "saved", "unseen", "temporaries", named as
                   the laboratory measures them
    peak           the most bytes alive at once
    flops          of matrix products and attention
    kernels        of forward and backward
    fits           None, or what the prediction leaves out
    """

    seconds: float
    seconds_parts: dict[str, float]
    seconds_by_part: dict[str, float]
    peak: int
    bytes_parts: dict[str, int]
    saved: int
    flops: int
    kernels: int
    fits: str | None


def predict(
    shape: Shape,
    batch: int,
    length: int,
    dtype: str,
    method: str,
    budget: Budget,
    options: Options,
    ceilings: dict,
    device: str = "cpu",
) -> Prediction:
    """One step of `method` on a batch (batch, length) of a model of `shape` in `dtype`.

    dtype: "float32", "bfloat16" or "float16". device: "cpu" or "cuda". ceilings: as
    `bench.ceilings.measure` returns them.

    Raises ValueError for a dtype, a method or a device that is not known, and for ceilings without
    the rate of a dtype that the step multiplies in.
    """
    if dtype not in ITEMSIZES:
        raise ValueError(f"dtype must be one of {list(ITEMSIZES)}, got {dtype!r}")
    if device not in LAUNCH:
        raise ValueError(f"device must be one of {list(LAUNCH)}, got {device!r}")
    itemsize = ITEMSIZES[dtype]
    book = walk(shape, batch, length, itemsize, method, budget, options, device)

    phases = {
        "forward": book.forward,
        "backward": book.backward,
        "optimizer": optimizer_kernels(book, method, budget),
    }
    names = {4: "float32", 2: dtype}
    timed = {
        phase: [(kernel.part, _seconds(kernel, names, ceilings)) for kernel in kernels]
        for phase, kernels in phases.items()
    }
    parts = {phase: sum(seconds for _, seconds in each) for phase, each in timed.items()}
    by_part: dict[str, float] = {}
    for part, seconds in (pair for each in timed.values() for pair in each):
        by_part[part] = by_part.get(part, 0.0) + seconds
    bytes_parts, peak = _memory(book, shape, batch * length, itemsize, method, budget)
    kernels = len(book.forward) + len(book.backward)
    total = sum(parts.values())
    return Prediction(
        seconds=total,
        seconds_parts=parts,
        seconds_by_part=by_part,
        peak=peak,
        bytes_parts=bytes_parts,
        saved=book.saved_bytes(),
        flops=sum(kernel.flops for kernel in (*book.forward, *book.backward)),
        kernels=kernels,
        fits=_fits(
            not_covered(shape, itemsize, options, device), method, total, kernels * LAUNCH[device]
        ),
    )


def floor(
    shape: Shape,
    batch: int,
    length: int,
    dtype: str,
    options: Options,
    ceilings: dict,
    device: str = "cpu",
) -> Prediction:
    """The frozen floor: what no method that trains something can get below, in eager PyTorch."""
    nothing = Budget(heads=0, channels=0, rank=0, seed=0)
    return predict(shape, batch, length, dtype, "frozen", nothing, options, ceilings, device)


def optimizer_kernels(book: Ledger, method: str, budget: Budget) -> list[Kernel]:
    """A step of the optimizer.

    Fused AdamW reads parameter, gradient and two states, and writes all but the gradient: 7 numbers
    in the parameter's dtype; SpIEL's work in single operators. GaLore's projects the gradient
    (N, K) to its rank and back, moves the states of that size in single operators (about 12 numbers
    each), and adds a scaled (N, K).
    """
    if method != "galore":
        moves = entries.MOVES.get(method, 7)
        return [Kernel("pointwise", "optimizer", 0, moves * value.nbytes) for value in book.trained]
    kernels = []
    for weight in book.trained:
        n, k = weight.shape
        rank, size = min(budget.galore_rank, n, k), weight.itemsize
        low = rank * max(n, k)
        product = (n * k + rank * min(n, k) + low) * size
        flops = 2 * rank * n * k
        kernels += [Kernel("gemm", "optimizer", flops, product, size)] * 2
        kernels.append(Kernel("pointwise", "optimizer", 0, (12 * low + 5 * n * k) * size))
    return kernels


def optimizer_bytes(book: Ledger, shape: Shape, method: str, budget: Budget) -> int:
    """What the optimizer holds between steps.

    AdamW: two states in each parameter's dtype and a count of steps, fp32. GaLore: `_galore_bytes`.
    SpIEL's: `bench.entries`.
    """
    if method in SPARSE:
        return sum(entries.state_bytes(*layer, method) for layer in _trained_entries(book, shape))
    if method == "galore":
        return sum(_galore_bytes(value, budget)[0] for value in book.trained)
    return sum(2 * value.nbytes + 4 for value in book.trained)


def _galore_bytes(weight: Value, budget: Budget) -> tuple[int, int]:
    """What galore-torch holds of a weight between steps, and what it takes to update it.

    Held: two states of the low rank and the projection, rank * min(N, K), which in fp32 is a view
    of the singular vectors and keeps all min(N, K)^2 alive. Taken: the projected gradient, the
    denominator and the update in the low rank, and the update (N, K), unscaled and scaled.
    """
    few, many = min(weight.shape), max(weight.shape)
    rank = min(budget.galore_rank, few)
    vectors = few if weight.itemsize == 4 else rank
    low = rank * many
    held, taken = 2 * low + vectors * few, 3 * low + 2 * few * many
    return held * weight.itemsize, taken * weight.itemsize


def _seconds(kernel: Kernel, names: dict[int, str], ceilings: dict) -> float:
    seconds = kernel.nbytes / ceilings["copy_bytes_per_second"]
    if not kernel.flops:
        return seconds
    name = names[kernel.itemsize]
    if name not in ceilings["gemm_flops"]:
        raise ValueError(f"ceilings['gemm_flops'] must have {name!r}, got {ceilings['gemm_flops']}")
    return max(kernel.flops / ceilings["gemm_flops"][name], seconds)


def _memory(
    book: Ledger, shape: Shape, tokens: int, itemsize: int, method: str, budget: Budget
) -> tuple[dict[str, int], int]:
    """Bytes by kind, and the peak: the highest of these moments.

    - in the forward of the last layer, where a method makes much that it does not keep;
    - in the backward of the loss: everything saved, and two more copies of the fp32 logits, which
      liger-kernel makes in pieces that are small;
    - in the backward of each layer: what this and the layers below saved (what all of this one
      saved, if it is checkpointed), the gradients of those above, and what the backward of a layer
      works with;
    - in the optimizer's step: all gradients; GaLore's also has what it makes of the largest of
      them, SpIEL's what was watched in the backward, as it has in the backward of each layer, and
      what it works with.
    """
    gradients, saved, unseen = book.gradient_bytes(), book.saved_bytes(), book.unseen_bytes()
    optimizer = optimizer_bytes(book, shape, method, budget)
    adapters = 0 if method in OWN_WEIGHTS else gradients
    weights = shape.parameters() * itemsize + adapters + _buffers(book, shape, itemsize, method)

    logits = 0 if book.fused else 4 * tokens * shape.vocab
    last = book.marks[-1][0] + book.recomputed + book.making
    updating = gradients
    if method == "galore":
        updating += max(_galore_bytes(value, budget)[1] for value in book.trained)
    moments = [unseen + last, unseen + saved + 2 * logits, updating]
    watched = 0.0  # bytes beside each byte of a gradient
    if method in SPARSE:
        counts = [count for _, count in _trained_entries(book, shape)]
        beside = sum(entries.watched_bytes(count, method) for count in counts)
        watched = beside / gradients
        moments.append(gradients + beside + entries.working_bytes(counts, method))
    for (below, _), (through, done) in zip(book.marks, book.marks[1:], strict=False):
        layer = max(through - below, book.recomputed)
        within = max(book.working, book.making if book.recomputed else 0)
        made = int((gradients - done) * (1 + watched))
        moments.append(unseen + below + layer + made + within)
    highest = max(moments)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "saved": saved,
        "unseen": unseen,
        "temporaries": highest - max(saved, gradients),
    }
    return parts, weights + optimizer + highest


def _buffers(book: Ledger, shape: Shape, itemsize: int, method: str) -> int:
    """What a method's model holds beside parameters: rotary frequencies, indices, base slices."""
    size = 2 * 4 * (shape.head_dim // 2)
    if method == "shira":  # rows and columns, int32
        size += 8 * sum(value.numel for value in book.trained)
    if method == "loreft":  # the rotation that the orthogonal map starts from
        size += 4 * shape.hidden**2 * shape.layers
    if method in SPARSE:
        layers = _trained_entries(book, shape)
        size += sum(entries.held_bytes(*layer, itemsize) for layer in layers)
    if method.startswith("s2ft"):  # index int32 and fingerprint int64, dim int32
        size += sum(12 * value.shape[1] + 4 for value in book.trained)
    if method in IN_PLACE:
        size += sum(value.numel for value in book.trained) * itemsize
    return size


def _trained_entries(book: Ledger, shape: Shape) -> list[tuple[tuple[int, int], int]]:
    """(N, K) and the number of SpIEL's entries of every weight."""
    weights = list(shape.linears().values()) * shape.layers
    return list(zip(weights, (value.numel for value in book.trained), strict=True))


def _fits(left_out: str | None, method: str, seconds: float, launches: float) -> str | None:
    reasons: Iterable[str | None] = (
        left_out,
        NOT_COUNTED.get(method),
        f"launches alone take about {launches * 1e3:.1f} ms" if launches > seconds / 2 else None,
    )
    return "; ".join(reason for reason in reasons if reason) or None
