"""Numbers of the S2FT paper (arXiv 2412.06289v3), beside which ours are drawn.

Figure 5, printed: one A100-80G SXM, bf16, LLaMA-2. The latency is the mean of the middle half of 40
last iterations of 200; the peak is that of a single first iteration, before an optimizer has state,
which flatters full fine-tuning most. GB are 10^9 bytes: 54 is four times the weights of the 7B
model. Figure 6, read off its curves: milliseconds, of devices that are not named.
"""

MACHINE = "printed in the paper, A100-80G"
NOTE = "Of the paper: bf16, GB of 10⁹ bytes, the peak of a first step."

METHODS = ("s2ft_permuted_inplace", "lora", "dora", "lisa", "loreft", "galore", "full")

# Of a shape, (length, batch) -> peak in GB and milliseconds of an iteration, in the order of
# METHODS; None where the paper has OOM.
_PRINTED = {
    "llama-2-7b": {
        (512, 1): ((18, 20, 22, 19, 20, 19, 54), (118, 138, 234, 135, 485, 610, 314)),
        (512, 2): ((23, 26, 30, 24, 26, 25, 54), (231, 260, 398, 250, 579, 717, 439)),
        (1024, 1): ((26, 29, 32, 26, 28, 27, 54), (258, 288, 418, 279, 606, 733, 461)),
        (1024, 2): ((39, 45, 52, 40, 42, 42, 54), (476, 529, 742, 504, 822, 1010, 713)),
    },
    "llama-2-13b": {
        (512, 1): ((33, 36, 39, 34, 38, 34, None), (190, 214, 429, 215, 815, 1144, None)),
        (512, 2): ((41, 46, 52, 42, 46, 43, None), (369, 411, 669, 398, 987, 1312, None)),
        (1024, 1): ((45, 50, 56, 46, 50, 47, None), (411, 453, 702, 437, 1029, 1355, None)),
        (1024, 2): ((67, 75, None, 67, 71, 70, None), (779, 865, None, 814, 1391, 1763, None)),
    },
}


def series(shape: str, method: str) -> list[tuple[int, float, float]]:
    """(tokens, seconds of an iteration, peak bytes) of one method, by tokens; empty where the paper
    has none."""
    place = METHODS.index(method) if method in METHODS else None
    return sorted(
        (length * batch, times[place] / 1e3, peaks[place] * 1e9)
        for (length, batch), (peaks, times) in _PRINTED.get(shape, {}).items()
        if place is not None and times[place] is not None
    )


# Figure 6a and 6b: to switch an adapter in a weight (d, d), 32 channels beside a LoRA of rank 16.
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
SWITCH = {
    "GPU": {
        "S2FT": (0.051, 0.052, 0.052, 0.051, 0.057, 0.056),
        "LoRA": (0.018, 0.025, 0.069, 0.203, 0.746, 2.92),
    },
    "CPU": {
        "S2FT": (0.12, 0.13, 0.20, 0.25, 0.33, 0.61),
        "LoRA": (0.16, 0.51, 1.9, 12.2, 31.0, 123.8),
    },
}
# Figure 6c: a token for each adapter; of S2FT the one that gathers inputs and the one that scatters
# outputs.
ADAPTERS = (1, 10, 100, 1000, 10_000, 100_000)
PARALLEL = {
    "S2FT, input channels": (0.056, 0.046, 0.073, 0.289, 2.55, 25.0),
    "S2FT, output channels": (0.045, 0.046, 0.068, 0.256, 2.17, 21.3),
    "LoRA": (0.064, 0.055, 0.076, 0.330, 3.00, 29.6),
}
