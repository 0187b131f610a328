"""The chips that kernels are compiled for, and the blocks that a multiprocessor of one holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A chip: triton's name for it, what its blocks and multiprocessors have, the instructions of
    its tensor cores and of its tensor copy engine.
    """

    backend: str
    arch: int | str
    matrix_instruction: str
    num_sms: int
    shared_bytes: int  # that one block may have
    shared_bytes_sm: int
    shared_bytes_reserved: int  # of every block, by the driver
    registers_lane: int = 512  # of one lane in each quarter of a multiprocessor
    register_granule: int = 8
    warps_sm: int = 64
    blocks_sm: int = 32
    warp_size: int = 32
    copy_instruction: str | None = None


_TMA = r"\bcp\.async\.bulk\.tensor"
_KIB = 1024
TARGETS = {
    "sm_80": Target("cuda", 80, r"\bmma\.sync", 108, 163 * _KIB, 164 * _KIB, _KIB),
    "sm_90": Target(
        *("cuda", 90, r"\bwgmma\.mma_async", 132, 227 * _KIB, 228 * _KIB, _KIB),
        copy_instruction=_TMA,
    ),
    "sm_100": Target(
        *("cuda", 100, r"\btcgen05\.mma", 148, 227 * _KIB, 228 * _KIB, _KIB),
        copy_instruction=_TMA,
    ),
    "gfx942": Target(
        *("hip", "gfx942", r"\bv_mfma_", 304, 64 * _KIB, 64 * _KIB, 0),
        warps_sm=32,
        warp_size=64,
    ),
}


def occupancy(row: dict, chip: Target) -> dict:
    """Blocks that a multiprocessor holds at once, and what keeps it from holding more."""
    registers = -(-max(row["registers"], 1) // chip.register_granule) * chip.register_granule
    quarters = 4
    warps_by_registers = quarters * (chip.registers_lane // registers)
    shared = row["shared_bytes"] + chip.shared_bytes_reserved
    limits = {
        "blocks": chip.blocks_sm,
        "warps": chip.warps_sm // row["warps"],
        "registers": warps_by_registers // row["warps"],
        "shared memory": chip.shared_bytes_sm // shared if shared else chip.blocks_sm,
    }
    if row["tensor_memory_columns"]:
        limits["tensor memory"] = 512 // row["tensor_memory_columns"]
    blocks = min(limits.values())
    return {
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * row["warps"] / chip.warps_sm, 3),
        "limited_by": ", ".join(name for name, limit in limits.items() if limit == blocks),
    }
