"""What the laboratory measures: cases, and the suites that they make up, most valuable first."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from bench.methods import METHODS, Options
from bench.steps.model_shapes import TABLE, Shape

PLAIN = Options()
FLOOR = "frozen"
# What the others are read against, and the subject: first wherever time is short.
CORE = ("s2ft_inplace", FLOOR, "lora", "lora_fused", "full", "s2ft_additive")


@dataclass(frozen=True)
class Case:
    """One method at one size: a step of `batch` sequences of `length` tokens.

    share: trained parameters as a share of all; None for as many as LoRA of rank 16 trains.
    timed: or else only counted, as where Python takes the time.
    """

    suite: str  # "figure5", "tokens", ...: the figure that it belongs to
    shape: Shape
    batch: int
    length: int
    dtype: str  # of the model: a name in torch
    method: str
    options: Options = PLAIN
    share: float | None = None
    timed: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def id(self) -> str:
        """Unique among all cases, and the same in every version of the laboratory."""
        shape = self.shape
        cuts = [(shape.layers, shape.of_layers), (shape.vocab, shape.of_vocab)]
        cut = ",".join(f"{number}of{whole}" for number, whole in cuts if number != whole)
        options = [
            f"+{field.name}" if value is True else f"+{value}"
            for field in fields(Options)
            if (value := getattr(self.options, field.name)) != field.default
        ]
        size = f"{self.batch}x{self.length}"
        model = f"{shape.name}:{cut}" if cut else shape.name
        share = [] if self.share is None else [f"{self.share:.2%}"]
        names = [self.suite, model, size, self.dtype, self.method + "".join(options), *share]
        return "/".join(names)

    @property
    def fullname(self) -> str:
        """The id as pytest-benchmark's JSON has it, with the file it comes from."""
        return f"bench/laboratory.py::{self.id}"

    def floor(self) -> "Case":
        """The frozen floor that this case is compared with: same sizes, same options."""
        return replace(self, method=FLOOR, share=None)

    def params(self) -> dict:
        """The case as its entry in the JSON states it."""
        shape = self.shape
        cuts = ("layers", "of_layers", "vocab", "of_vocab")
        widths = ("hidden", "intermediate", "heads", "kv_heads")
        return {
            "shape": shape.name,
            **{name: getattr(shape, name) for name in (*cuts, *widths)},
            "batch": self.batch,
            "length": self.length,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "method": self.method,
            "options": {field.name: getattr(self.options, field.name) for field in fields(Options)},
            "share": self.share,
            "timed": self.timed,
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
    """Every combination, sizes (batch, length) outermost; methods that are not in METHODS fail."""
    unknown = set(methods) - METHODS.keys()
    if unknown:
        raise ValueError(f"methods must be among {list(METHODS)}, got {sorted(unknown)}")
    return [
        Case(suite, shape, batch, length, dtype, method, choice, share)
        for batch, length in sizes
        for choice in options
        for share in shares
        for method in methods
    ]


def core_first(methods: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(methods, key=lambda name: CORE.index(name) if name in CORE else len(CORE)))


SHARES = (0.001, 0.005, 0.02, 0.1)
CHECKPOINTING = Options(checkpointing=True)
FULL_DEPTH = Options(full_depth=True)
DENSITIES = (0.001, 0.01, 0.1, 0.5)
# Whose backward may stop above the embedding, of S2FT and what it is held against.
STOPPING = ("s2ft_inplace", "s2ft_unfused", "s2ft_additive", "lora", "lora_fused")
# What two layers would not show: LISA would train all of them, GaLore would decompose weights of
# such widths for minutes, and adapters in fp32 are those of a model in fp32.
WHOLE = ("lisa", "galore", "lora_fp32")
# From cuts of one and two layers, beside the whole model.
EXTRAPOLATED = (FLOOR, "full", "lora", "s2ft_inplace")


def cpu() -> list[Case]:
    """Two cores, a quarter of an hour: two layers of a published model, a small model in full.

    A cut flatters a method that stops at its first trained layer, hence those at equal depth, too.
    With the whole vocabulary the head would be 43 % of the products of a cut, where it is 6 % of
    the model's: two layers of 22 have 2/22 of it, in whole 64s.
    """
    wide, small = TABLE["tinyllama-1.1b"].cut(2, vocab=2880), TABLE["small"]
    dtype, size = "float32", [(1, 128)]
    others = [name for name in METHODS if name not in (*CORE, *WHOLE)]
    in_small = [
        *grid("figure5", small, size, dtype, (*EXTRAPOLATED, *WHOLE)),
        *grid("tokens", small, [(1, 64), *size, (1, 256)], dtype, EXTRAPOLATED),
        *grid("extrapolation", small.cut(1), size, dtype, EXTRAPOLATED),
        *grid("extrapolation", small.cut(2), size, dtype, EXTRAPOLATED),
        *grid("extrapolation", small, size, dtype, EXTRAPOLATED),
        *grid("share", small, size, dtype, (FLOOR,)),
        *grid("share", small, size, dtype, ("s2ft_inplace", "lora"), shares=SHARES[1:]),
        *grid("checkpointing", small, size, dtype, EXTRAPOLATED, [PLAIN, CHECKPOINTING]),
    ]
    density = [
        *grid("density", small.cut(2), [(1, 16)], dtype, (FLOOR, "full")),
        *grid("density", small.cut(2), [(1, 16)], dtype, ("spiel",), shares=DENSITIES),
    ]
    # Method by method, so that other cases lie between those of one size: see bench.quiet.
    in_small.sort(key=lambda case: (*CORE, *METHODS).index(case.method))
    return [
        *grid("figure5", wide, size, dtype, CORE),
        *grid("depth", wide, size, dtype, STOPPING, [FULL_DEPTH]),
        *grid("figure5", wide, size, dtype, others),
        # few tokens and narrow layers, for entries to show beside activations: 7,000 operators in
        # 20 ms say nothing of SpIEL's speed
        *(replace(case, timed=False) for case in density),
        *in_small,
    ]


def gpu() -> list[Case]:
    """One large GPU: the paper's figure first, then longer sequences, then what is asked rarely.

    GaLore's SVD of every weight takes minutes at these widths: its cases are cuts of few layers.
    """
    llama7, llama13, llama8 = (TABLE[f"llama-{name}"] for name in ("2-7b", "2-13b", "3-8b"))
    dtype = "bfloat16"
    paper = [(1, 512), (2, 512), (1, 1024), (2, 1024)]
    long = [(1, 2048), (2, 2048), (4, 2048)]
    galore = [name for name in METHODS if name.startswith("galore")]
    others = [name for name in METHODS if name not in (*CORE, *galore)]
    return [
        *grid("figure5", llama7, paper, dtype, CORE),
        *grid("tokens", llama8, long, dtype, CORE),
        *grid("figure5", llama13, paper, dtype, CORE),
        *grid("tokens", llama7, [(1, 512), (1, 1024), *long], dtype, CORE),
        *grid("figure5", llama7, paper, dtype, others),
        # where the table has the model: at its largest batch of the first figure
        *grid("depth", llama7, paper[-1:], dtype, STOPPING, [PLAIN, FULL_DEPTH]),
        *grid("tokens", llama13, long, dtype, CORE),
        *grid("figure5", llama13, paper, dtype, others),
        *grid("checkpointing", llama8, [(4, 2048)], dtype, CORE, [PLAIN, CHECKPOINTING]),
        *grid("share", llama7, [(1, 2048)], dtype, (FLOOR,)),
        *grid("share", llama7, [(1, 2048)], dtype, ("s2ft_inplace", "lora"), shares=SHARES),
        *grid("extrapolation", llama7.cut(1), [(1, 512)], dtype, (*EXTRAPOLATED, *galore)),
        *grid("extrapolation", llama7.cut(2), [(1, 512)], dtype, (*EXTRAPOLATED, *galore)),
        *grid("extrapolation", llama7, [(1, 512)], dtype, EXTRAPOLATED),
        *grid("options", llama8, [(1, 2048)], dtype, CORE[:-1], OPTIONS),
        *grid("density", llama7.cut(2), [(1, 512)], dtype, (FLOOR, "full")),
        *grid("density", llama7.cut(2), [(1, 512)], dtype, ("spiel",), shares=DENSITIES),
    ]


# torch.compile last: its compilation takes longer than all that is measured of it.
OPTIONS = (PLAIN, Options(attention="cudnn"), Options(liger=True), Options(compile=True))


def toy() -> list[Case]:
    """Every method and every kind of case, in seconds: to see that the laboratory runs."""
    model = TABLE["toy"]
    size, methods = [(2, 8)], ("s2ft_inplace", "lora")
    density = grid("density", model, size, "float32", ("spiel",), shares=(0.01, 0.1))
    return [
        *grid("figure5", model, size, "float32", core_first(METHODS)),
        *grid("tokens", model, [(1, 8)], "float32", methods),
        *grid("depth", model, size, "float32", methods, [PLAIN, FULL_DEPTH]),
        *grid("extrapolation", model.cut(1), size, "float32", methods),
        *grid("share", model, size, "float32", (FLOOR,)),
        *grid("share", model, size, "float32", (*methods, "s2ft_unfused"), shares=(0.01,)),
        *grid("density", model, size, "float32", (FLOOR,)),
        *(replace(case, timed=False) for case in density),
        *grid("checkpointing", model, size, "float32", methods, [PLAIN, CHECKPOINTING]),
    ]


def short(device_type: str) -> list[Case]:
    """The cases of the device's suite that bench.compare measures again: CORE at one size."""
    suite = gpu() if device_type == "cuda" else cpu()
    first = suite[0]
    return [
        case for case in suite if case == replace(first, method=case.method) and case.method in CORE
    ]
