"""Which heads and channels are trained, and how many (S2FT section 3.2)."""

import hashlib
import math

import torch
from torch import Tensor


def budget(value: int | float, total: int, name: str, block: int = 1) -> int:
    """How many of `total` units are trained.

    value  an int is a count, 1 to total; a float is a share, above 0 and at most 1, of which the
           nearest count is taken, at least 1. So 1 is one unit and 1.0 is all of them.
    name   what is counted, for the messages: "heads"
    block  the answer is rounded up to a multiple of it, as far as `total` holds whole blocks

    Raises TypeError for another type, bool included; ValueError for a value outside the range, and
    for a total smaller than one block.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: a count (int) or a share (float) wanted, got {type(value).__name__} {value!r}"
        )
    if block < 1 or total < block:
        raise ValueError(f"{name}: blocks of {block} wanted, there are {total} in all")
    if isinstance(value, int):
        if not 1 <= value <= total:
            raise ValueError(f"{name}: {value} wanted of {total}, a count must be 1 to {total}")
        count = value
    else:
        if not 0 < value <= 1:
            raise ValueError(f"{name}: {value} wanted, a share must be above 0 and at most 1")
        count = max(1, math.floor(value * total + 0.5))
    return min(math.ceil(count / block), total // block) * block


def random_units(seed: int, name: str, total: int, count: int, block: int = 1) -> Tensor:
    """S2FT-R: `count` of `total` heads or channels at random, int32 (count,), ascending.

    With block > 1 the units come in runs of `block` consecutive ones that begin at a multiple of
    `block`; a shorter run at the end of `total` is never drawn.

    The answer follows from the arguments alone: neither the order in which modules are visited nor
    the global random state, the default device or the machine matters. Layers of one model draw
    independently because `name` is theirs. A release of torch may change its generator, which is
    why adapters store their indices and not their seed.

    Raises ValueError if count is no multiple of block or exceeds the units in whole blocks.
    """
    num_blocks = total // block if block > 0 else 0
    if not 0 < count <= num_blocks * block or count % block:
        raise ValueError(
            f"{name}: {count} units wanted of {total} in blocks of {block}, a count must be a "
            f"multiple of {block} from {block} to {num_blocks * block}"
        )
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    blocks = torch.randperm(num_blocks, generator=generator, device="cpu")[: count // block]
    starts = blocks.sort().values.to(torch.int32) * block
    within = torch.arange(block, dtype=torch.int32, device="cpu")
    return (starts.unsqueeze(1) + within).flatten()
