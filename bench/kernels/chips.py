"""The chips that kernels are compiled for, and the blocks that a multiprocessor of one holds."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """backend, arch: triton's name for the chip. *_instruction: those of its special units."""

    backend: str
    arch: int | str
    num_sms: int
    shared_bytes: int  # that one block may have
    matrix_instruction: str  # of the tensor cores
    copy_instruction: str | None = None  # of the tensor copy engine
    reserved_bytes: int = KIB  # of shared memory for every block, by the driver
    warps_sm: int = 64
    warp_size: int = 32


_TMA = r"\bcp\.async\.bulk\.tensor"
TARGETS = {
    "sm_80": Target("cuda", 80, 108, 163 * KIB, r"\bmma\.sync"),
    "sm_90": Target("cuda", 90, 132, 227 * KIB, r"\bwgmma\.mma_async", _TMA),
    "sm_100": Target("cuda", 100, 148, 227 * KIB, r"\btcgen05\.mma", _TMA),
    "gfx942": Target(
        *("hip", "gfx942", 304, 64 * KIB, r"\bv_mfma_"),
        reserved_bytes=0,
        warps_sm=32,
        warp_size=64,
    ),
}


def occupancy(row: dict, chip: Target) -> dict:
    """Blocks that a multiprocessor holds at once, and what keeps it from holding more."""
    # Of all four: 32 blocks, and 512 registers of a lane in each quarter, which come by eights.
    registers = -(-max(row["registers"], 1) // 8) * 8
    limits = {
        "blocks": 32,
        "warps": chip.warps_sm // row["warps"],
        "registers": 4 * (512 // registers) // row["warps"],
    }
    # One block may have all of a multiprocessor's but what is reserved for it.
    if shared := row["shared_bytes"] + chip.reserved_bytes:
        limits["shared memory"] = (chip.shared_bytes + chip.reserved_bytes) // shared
    if row["tensor_memory_columns"]:
        limits["tensor memory"] = 512 // row["tensor_memory_columns"]
    blocks = min(limits.values())
    return {
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * row["warps"] / chip.warps_sm, 3),
        "limited_by": ", ".join(name for name, limit in limits.items() if limit == blocks),
    }
