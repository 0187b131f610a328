"""Names that files which are about to be replaced still import from here."""

from bench.measure.timing import laps, order, paired_ratios, quartiles, stats, synchronize

__all__ = ["laps", "order", "paired_ratios", "quartiles", "stats", "synchronize"]
