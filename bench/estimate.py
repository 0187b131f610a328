"""How long a case will take, so that none is begun that would end too late."""

import statistics
from dataclasses import dataclass, field

from bench import rounds
from bench.cases import Case
from bench.fresh import Setup

# methods that compute dW of every weight, SpIEL to read out its entries
DENSE_GRADIENTS = ("full", "spiel", "spiel_ma")


@dataclass
class Estimate:
    """How long cases will take: from the rate of matrix products, corrected by what they took."""

    setup: Setup
    fixed: float = 1.0  # seconds, for anything that does not grow with the model
    compilation: float = 200.0  # seconds, of torch.compile, of a model of 32 layers
    filled_per_second: float = 5e8  # weights of a fresh model, on the CPU; on a GPU in no time
    efficiency: float = 0.7  # of a step, against its matrix products at the ceiling
    steps_counted: int = 8  # those before the clock, a profiled one being a little slower
    quiet: float = 0.3  # of the seconds of the precision: what it takes on a quiet machine
    _corrections: list[float] = field(default_factory=list)

    def seconds(self, case: Case) -> float:
        correction = statistics.median(self._corrections) if self._corrections else 1.0
        return correction * self._uncorrected(case)

    def took(self, case: Case, seconds: float) -> None:
        self._corrections.append(seconds / self._uncorrected(case))

    def _uncorrected(self, case: Case) -> float:
        rate = self.setup.ceilings["gemm_flops"][case.dtype] * self.efficiency
        products = case.shape.linear_parameters() + case.shape.vocab * case.shape.hidden
        passes = 1.5 if case.options.checkpointing else 1.0
        floor = 4 * products * case.tokens * passes / rate
        step = floor * (1.5 if case.method in DENSE_GRADIENTS else 1.0)
        precision = self.setup.precision
        timed = max(self.quiet * precision.seconds, precision.min_seconds) / (step + floor)
        timed = min(max(timed, precision.min_rounds), precision.max_rounds)
        seconds = self.fixed + self.steps_counted * step
        if case.timed:
            seconds += (timed + rounds.WARM_UP) * (step + floor)
        if self.setup.device.type == "cpu":
            seconds += 3 * case.shape.parameters() / self.filled_per_second
        if case.options.compile:
            seconds += self.compilation
        if case.method.startswith("galore"):
            seconds += self._decompositions(case)
        return seconds

    def _decompositions(self, case: Case) -> float:
        """GaLore's, of all gradients, in the four steps in which it makes them."""
        share = 0.3 if self.setup.device.type == "cpu" else 0.02  # of the rate of products
        sides = [(min(shape), max(shape)) for shape in case.shape.linears().values()]
        flops = 20 * case.shape.layers * sum(short**2 * long for short, long in sides)
        return 4 * flops / (share * self.setup.ceilings["gemm_flops"]["float32"])
