"""What a user of SpIEL chooses, as PEFT configurations are written."""

from dataclasses import dataclass

from s2kernels.autograd.checks import MODES, check_choice
from s2kernels.peft.host.config import AdapterConfig, MethodType, option
from s2kernels.peft.host.model_card import CardText
from s2kernels.peft.spiel.schedule import DECAYS, Schedule

SELECTIONS = ("accumulated_gradient", "momentum_approximation")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PEFT_TYPE = MethodType("SPIEL")


@dataclass
class SpIELConfig(AdapterConfig):
    """Sparse fine-tuning of scattered entries that are dropped and grown (SpIEL, arXiv 2401.16405).

    Of every target, as many entries of the weight are trained as its share of all targets' entries
    comes to. They are drawn at random, as a function of (seed, name of the module); then, every
    reselection_steps, those that have changed least give way to others: see
    `s2kernels.peft.SpIELTuner` and, for a Trainer, `SpIELCallback`, without which they stay.

    Choices that are out of range raise ValueError or TypeError here or, where the model decides,
    in `get_peft_model`, which then leaves the model as it was.
    """

    target_modules: list[str] | set[str] | str | None = option(
        "all-linear",
        "Names of the linear layers to train, a regular expression, or 'all-linear', "
        "which leaves out the output head.",
    )
    density: float = option(
        0.01, "Entries trained, as a share of all parameters of the model, targets or not."
    )
    num_tunable_weights: int | None = option(
        None,
        "Entries trained, in the place of density; a layer's part is rounded down, but "
        "to 1 at least. What is saved with an adapter has what density comes to.",
    )
    selection: str = option(
        "accumulated_gradient",
        "What grows: entries of large 'accumulated_gradient' (SpIEL-AG), or of large "
        "'momentum_approximation' (SpIEL-MA), a product of the optimizer SM3's statistics.",
    )
    reselection_steps: int = option(20, "Optimizer steps from one reselection to the next.")
    accumulation_steps: int = option(
        5,
        "Steps for which gradients are watched before a reselection. The first one "
        "comes after so many.",
    )
    initial_replacement_rate: float = option(
        0.2, "Share of the entries that a reselection replaces, at the start."
    )
    final_replacement_rate: float = option(0.0, "That share at the end of the training.")
    replacement_schedule: str = option(
        "linear",
        "How it goes from one to the other: 'linear', where the first reselection "
        "replaces all entries, as these were drawn at random, or 'cosine', where it does not. "
        "In trainings of 60 steps 'cosine' learnt more.",
    )
    delta_dtype: str | None = option(
        None,
        "Dtype of the trained deltas, such as 'bfloat16'. Default: float32, or float64 "
        "where the base is float64.",
    )
    seed: int = option(0, "Seed of the random entries at the start.")
    mode: str = option(
        "auto",
        "'inplace': the entries are written into the dense weight. 'additive': into "
        "copies of its panels, made for each GEMM; the base may be quantized. 'auto': inplace "
        "where it is legal, else additive.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        check_choice("mode", self.mode, MODES + ("auto",))
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("replacement_schedule", self.replacement_schedule, DECAYS)
        if self.delta_dtype is not None:
            check_choice("delta_dtype", self.delta_dtype, DTYPES)
        if not isinstance(self.density, float) or not 0 < self.density <= 1:
            raise ValueError(f"density must be a float in (0, 1], got {self.density!r}")
        num = self.num_tunable_weights
        if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 1):
            raise ValueError(f"num_tunable_weights must be an int of at least 1, got {num!r}")
        self.schedule(total_steps=1)  # raises where the rest is out of range

    def schedule(self, total_steps: int) -> Schedule:
        """When entries are replaced in a training of so many optimizer steps."""
        return Schedule(
            total_steps,
            self.reselection_steps,
            self.accumulation_steps,
            self.initial_replacement_rate,
            self.final_replacement_rate,
            self.replacement_schedule,
        )

    def card_text(self) -> CardText:
        num = self.num_tunable_weights
        budget = f"density {self.density}" if num is None else f"a budget of {num:,}"
        return CardText(
            "## SpIEL adapter",
            ("spiel", "arxiv:2401.16405"),
            "Sparse fine-tuning: scattered entries of the linear layers' weights were trained\n"
            f"({budget}, selection {self.selection}, seed {self.seed}).",
            "`s2kernels merge` makes one model of base and adapter, which loads without s2kernels.",
        )
