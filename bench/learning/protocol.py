"""The protocol of the language-model studies: fixed before any of them was run."""

from dataclasses import asdict, dataclass

VERSION = 1  # of what a run does; a change makes all runs due again


@dataclass(frozen=True)
class Protocol:
    """Sizes of one training and of its evaluation. They are part of the key of every run."""

    steps: int = 40
    problems: int = 4  # of one step: one packed row, each problem once
    longest: int = 112  # tokens of a training or validation problem and of a test of answers
    longest_hard: int = 128  # tokens of a problem of the hard test
    longest_question: int = 40  # tokens of a question with one of its answers
    warm_up: float = 0.1  # share of the steps; then the rate falls linearly to 0
    clip: float = 1.0  # norm of the gradient
    validation: int = 32  # problems, held out of the training file
    easy: int = 32  # problems of the easy test: loss
    decoded: int = 24  # the first of these: exact answers by greedy decoding
    hard: int = 16  # problems of the hard test: loss
    choice: int = 32  # questions with a numbered choice: loss and accuracy
    knowledge: int = 32  # questions of which the most likely answer's text is taken
    windows: int = 8  # of text that is no task
    window: int = 128  # tokens of each
    new_tokens: int = 56  # that greedy decoding may take
    calibration: int = 32  # problems for scores of channels
    reselection: tuple[int, int] = (8, 3)  # SpIEL: steps between reselections, steps watched

    def key(self) -> dict:
        return asdict(self) | {"version": VERSION}


SMALL = Protocol()
TOY = Protocol(
    steps=4,
    problems=2,
    validation=4,
    easy=4,
    decoded=3,
    hard=3,
    choice=4,
    knowledge=4,
    windows=2,
    window=24,
    new_tokens=4,
    calibration=2,
    reselection=(3, 1),
)

SEEDS = (0, 1, 2)
RANK = 4  # of LoRA on all linear layers; the others train as many parameters
RATES = (3e-4, 1e-3, 3e-3)  # peak learning rates of every method but full
FULL_RATES = (3e-5, 1e-4, 3e-4)
HIGHER = 3  # a rate so many times the highest is tried, too, where that is the best
