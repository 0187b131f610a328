"""Which steps are measured: cases, and the suites of figures that they belong to."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from bench.methods import METHODS, Options
from bench.steps.model_shapes import TABLE, Shape

SUITES = ("full", "short", "toy")
PLAIN = Options()
CHECKPOINTING = Options(checkpointing=True)
FULL_DEPTH = Options(full_depth=True)
FLOOR = "frozen"
S2FT = ("s2ft_inplace", "s2ft_additive", "s2ft_permuted_inplace", "s2ft_permuted_additive")
# The most valuable methods. They come first, for where time is short.
CORE = (FLOOR, "s2ft_inplace", "lora", "lora_fused", "full", *S2FT[1:])
# Methods that take no share: they cannot choose how much they train.
FIXED = (FLOOR, "full", "lisa", "loreft")
# Methods whose backward may stop above the embedding.
STOPPING = (*S2FT, "s2ft_unfused", "lora", "lora_fused")


@dataclass(frozen=True)
class Case:
    """One method at one size: a step of `batch` sequences of `length` tokens.

    suites: the figures that it belongs to: "figure5", "tokens", ...
    dtype: of the model, a name in torch.
    share: trained parameters as a share of all; None for as many as LoRA of rank 16 trains.
    """

    suites: tuple[str, ...]
    shape: Shape
    batch: int
    length: int
    dtype: str
    method: str
    options: Options = PLAIN
    share: float | None = None

    @property
    def id(self) -> str:
        """Unique among all cases. Results of two versions of the code are compared by it."""
        shape = self.shape
        cuts = [(shape.layers, shape.of_layers), (shape.vocab, shape.of_vocab)]
        cut = ",".join(f"{number}of{whole}" for number, whole in cuts if number != whole)
        model = f"{shape.name}:{cut}" if cut else shape.name
        given = {k: v for k, v in vars(self.options).items() if v != getattr(PLAIN, k)}
        options = "".join(f"+{k}" if v is True else f"+{v}" for k, v in given.items())
        parts = [model, f"{self.batch}x{self.length}", self.dtype, self.method + options]
        return "/".join(parts if self.share is None else [*parts, f"{self.share:.2%}"])

    def floor(self) -> "Case":
        """The frozen floor that this case is compared with. It always computes dx in full depth."""
        options = replace(self.options, full_depth=False)
        return replace(self, method=FLOOR, options=options, share=None)

    def params(self) -> dict:
        """The case as its entry in the JSON states it."""
        widths = ("layers", "of_layers", "vocab", "of_vocab", "hidden", "intermediate")
        return {
            "suites": list(self.suites),
            "floor": self.floor().id,
            "shape": self.shape.name,
            **{name: getattr(self.shape, name) for name in (*widths, "heads", "kv_heads")},
            "batch": self.batch,
            "length": self.length,
            "tokens": self.batch * self.length,
            "dtype": self.dtype,
            "method": self.method,
            "options": asdict(self.options),
            "share": self.share,
        }


def grid(
    suite: str,
    shape: Shape,
    sizes: Iterable[tuple[int, int]],
    dtype: str,
    methods: Iterable[str],
    options: Iterable[Options] = (PLAIN,),
    shares: Iterable[float | None] = (None,),
) -> list[Case]:
    """Every combination, sizes (batch, length) outermost."""
    return [
        Case((suite,), shape, *size, dtype, method, choice, None if method in FIXED else share)
        for size in sizes
        for choice in options
        for share in shares
        for method in methods
    ]


def united(*parts: list[Case]) -> list[Case]:
    """Each case once, in the order of first mention, with the suites of all its mentions."""
    found: dict[str, Case] = {}
    for case in itertools.chain(*parts):
        suites = (*found.get(case.id, case).suites, *case.suites)
        found[case.id] = replace(case, suites=tuple(dict.fromkeys(suites)))
    return list(found.values())


SHARED, SHARES = (FLOOR, "s2ft_inplace", "lora"), (0.001, 0.005, 0.02, 0.1)
SPARSE, DENSITIES = (FLOOR, "full", "spiel"), (0.001, 0.01, 0.1, 0.5)
# From cuts of one and two layers to the whole model.
EXTRAPOLATED = (FLOOR, "full", "lora", "s2ft_inplace")


def cpu() -> list[Case]:
    """A quarter of an hour on two cores: two layers of a published model, a small model in full.

    With the whole vocabulary the head would be 43 % of the products of the cut. It is 6 % of the
    model's. So two of its 22 layers come with 2/22 of the vocabulary, in whole 64s.
    """
    wide, small = TABLE["tinyllama-1.1b"].cut(2, vocab=2880), TABLE["small"]
    dtype, size = "float32", [(1, 128)]
    # Two layers cannot show these three: LISA would train both, GaLore would decompose such widths
    # for minutes, and the adapters in fp32 are those of a model in fp32.
    whole = ("lisa", "galore", "lora_fp32")
    others = [name for name in METHODS if name not in (*CORE, *whole)]
    return united(
        grid("figure5", wide, size, dtype, CORE),
        grid("depth", wide, size, dtype, STOPPING, [PLAIN, FULL_DEPTH]),
        grid("figure5", wide, size, dtype, others),
        grid("figure5", small, size, dtype, (*EXTRAPOLATED, *S2FT[1:], *whole)),
        grid("tokens", small, [(1, 64), *size, (1, 256)], dtype, EXTRAPOLATED),
        grid("extrapolation", small.cut(1), size, dtype, EXTRAPOLATED),
        grid("extrapolation", small.cut(2), size, dtype, EXTRAPOLATED),
        grid("extrapolation", small, size, dtype, EXTRAPOLATED),
        grid("share", small, size, dtype, SHARED, shares=SHARES[1:]),
        grid("checkpointing", small, size, dtype, EXTRAPOLATED, [PLAIN, CHECKPOINTING]),
        # Few tokens and narrow layers, so that entries show beside activations.
        grid("density", small.cut(2), [(1, 16)], dtype, SPARSE, shares=DENSITIES),
    )


# torch.compile comes last: it takes longer than all that is measured of it.
OPTIONS = (PLAIN, Options(attention="cudnn"), Options(liger=True), Options(compile=True))


def gpu() -> list[Case]:
    """One large GPU: the paper's figure first, then longer sequences, then what is rarely asked.

    GaLore's SVD of every weight takes minutes at these widths: its cases are cuts of few layers.
    """
    llama7, llama13, llama8 = (TABLE[f"llama-{name}"] for name in ("2-7b", "2-13b", "3-8b"))
    dtype = "bfloat16"
    paper = [(1, 512), (2, 512), (1, 1024), (2, 1024)]
    long = [(1, 2048), (2, 2048), (4, 2048)]
    others = [name for name in METHODS if name not in (*CORE, "galore")]
    cut = (*EXTRAPOLATED, "galore")
    return united(
        grid("figure5", llama7, paper, dtype, CORE),
        grid("tokens", llama8, long, dtype, CORE),
        grid("figure5", llama13, paper, dtype, CORE),
        grid("tokens", llama7, [(1, 512), (1, 1024), *long], dtype, CORE),
        grid("figure5", llama7, paper, dtype, others),
        grid("depth", llama7, paper[-1:], dtype, STOPPING, [PLAIN, FULL_DEPTH]),
        grid("tokens", llama13, long, dtype, CORE),
        grid("figure5", llama13, paper, dtype, others),
        grid("checkpointing", llama8, [(4, 2048)], dtype, CORE, [PLAIN, CHECKPOINTING]),
        grid("share", llama7, [(1, 2048)], dtype, SHARED, shares=SHARES),
        grid("extrapolation", llama7.cut(1), [(1, 512)], dtype, cut),
        grid("extrapolation", llama7.cut(2), [(1, 512)], dtype, cut),
        grid("extrapolation", llama7, [(1, 512)], dtype, EXTRAPOLATED),
        grid("options", llama8, [(1, 2048)], dtype, CORE, OPTIONS),
        grid("density", llama7.cut(2), [(1, 512)], dtype, SPARSE, shares=DENSITIES),
    )


def toy() -> list[Case]:
    """The cases of a CPU with a toy model and short sequences: to see, in seconds, that all run."""

    def small(case: Case) -> Case:
        shape = TABLE["toy"].cut(min(case.shape.layers, TABLE["toy"].layers))
        # Of two tokens the first alone has a loss, and it attends to itself: q and k have no part.
        return replace(case, shape=shape, batch=2, length=max(4, case.length // 8))

    return united([small(case) for case in cpu()])


def suite(name: str, device_type: str) -> list[Case]:
    """What `pytest bench --suite` measures on "cuda" or "cpu", by one of the names SUITES."""
    if name == "toy":
        return toy()
    cases = gpu() if device_type == "cuda" else cpu()
    return cases[: len(CORE)] if name == "short" else cases  # the core methods at the first size
