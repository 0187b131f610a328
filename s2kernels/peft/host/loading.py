"""Which adapters of a layer were loaded since the last look."""

from collections.abc import Mapping

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from s2kernels.autograd.checks import version_of

# an adapter's index and fingerprint, and their versions
Sources = list[tuple[Tensor, int]]


def sources(index: Tensor, fingerprint: Tensor) -> Sources:
    """What the two buffers of an adapter are now."""
    return [(index, version_of(index)), (fingerprint, version_of(fingerprint))]


def changed(
    indices: BufferDict,
    fingerprints: BufferDict,
    seen: Mapping[str, Sources],
    loaded: bool,
) -> dict[str, bool]:
    """The adapters that are not as they were seen; with `loaded`, all of them. Whether the
    fingerprint still is the layer's own, that is, did not come along.
    """
    found = {}
    for name, index in indices.items():
        pairs = zip(seen.get(name, ()), sources(index, fingerprints[name]), strict=False)
        same = [old[0] is new[0] and old[1] == new[1] for old, new in pairs]
        if loaded or same != [True, True]:
            found[name] = same[1:] == [True]
    return found


def moved(
    indices: BufferDict,
    fingerprints: BufferDict,
    seen: Mapping[str, Sources],
    found: Mapping[str, bool],
) -> dict[str, Sources]:
    """What is seen after the buffers were moved, or cast: all of them, but for what had been found
    to be `changed` before, which is still to be looked at.
    """
    now = {name: sources(index, fingerprints[name]) for name, index in indices.items()}
    for name, is_own in found.items():
        index, fingerprint = seen[name]
        now[name] = [index, now[name][1] if is_own else fingerprint]
    return now
