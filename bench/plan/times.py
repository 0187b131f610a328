"""How long a step on many GPUs should take, predicted from counted work and from given rates.

Computing is what `bench.predict` says of one GPU, but for the optimizer, which has a shard.
Exchanging is what the counted collectives need on the links alone: each byte of them reaches every
node once through the network, and every GPU once through NVLink, at the rates of the data sheets.
Nothing is measured. Where all is exchanged while something is computed, a step takes the longer of
the two, and where nothing is, their sum. A real step lies between, and above for what a prediction
leaves out: latencies, launches, slow ranks, links that do not reach their data sheet.
"""

from dataclasses import dataclass, replace

from bench.methods import Budget, Options, comparable
from bench.plan.rank import Rank, Step
from bench.predict import predict
from bench.steps.cases import Case
from bench.steps.model_shapes import Shape
from bench.steps.work import GPUS, Ceilings
from s2kernels.peft import S2FTConfig
from s2kernels.select import budget

# Of bench.methods, as they run with sharded weights.
LABORATORY = {"full": "full", "lora": "lora", "s2ft": "s2ft_additive"}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    nvlink, network: bytes/s that a GPU receives from its node, and from others by its own adapter.
    """

    ceilings: Ceilings
    nvlink: float
    network: float
    node: int = 8

    def exchanging(self, nbytes: int, gpus: int) -> float:
        """Seconds for collectives of so many bytes, over all of `gpus`."""
        nodes = -(-gpus // self.node)
        within = nbytes * (gpus - 1) / gpus / self.nvlink
        between = nbytes * (nodes - 1) / nodes / (self.network * min(gpus, self.node))
        return max(within, between)


# NVLink 4 and one 400 Gbit/s adapter a GPU; NVLink 3 and 200 Gbit/s.
CLUSTERS = {
    "H200": Cluster(GPUS["H200"], nvlink=450e9, network=50e9),
    "A100": Cluster(GPUS["A100"], nvlink=300e9, network=25e9),
}


@dataclass(frozen=True)
class Seconds:
    """Predicted, of one step."""

    computing: float
    exchanging: float


def defaults(shape: Shape, rank: int) -> Budget:
    """What `bench.plan.rank.count` trains, for the methods of the laboratory."""
    config = S2FTConfig()
    return replace(
        comparable(shape.config(1), rank=rank),
        heads=budget(config.heads, shape.heads, "heads"),
        channels=budget(config.channels, shape.intermediate, "channels"),
    )


def seconds(
    shape: Shape,
    method: str,
    gpus: int,
    batch: int,
    length: int,
    rank: int,
    counted: Rank,
    cluster: Cluster,
) -> dict[str, Seconds]:
    """A step without ("plain") and with ("checkpointed") gradient checkpointing.

    counted: what `bench.plan.rank.count` says with the same arguments.
    """
    sizes = defaults(shape, rank)
    bandwidth = cluster.ceilings.bytes
    # Parameters and two states are read and written, gradients are read, all of them fp32.
    updating = 7 * 4 * counted.trained / gpus / bandwidth

    def of(checkpointing: bool, step: Step) -> Seconds:
        options = Options(checkpointing=checkpointing)
        name = LABORATORY[method]
        alone = predict(Case((), shape, batch, length, "bfloat16", name, options), sizes)
        computing = alone.seconds(cluster.ceilings) - alone.updating / bandwidth + updating
        exchanged = step.gathered + step.scattered
        return Seconds(computing, cluster.exchanging(exchanged, gpus))

    return {
        "plain": of(False, counted.plain),
        "checkpointed": of(True, counted.checkpointed),
    }
