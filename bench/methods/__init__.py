"""The methods side by side: each takes over one model and trains its part of it."""

from bench.methods.adapters import DoRA, LoRA, LoRAFP32, SHiRA
from bench.methods.base import Method
from bench.methods.budget import Budget, comparable
from bench.methods.dense import LISA, Frozen, Full
from bench.methods.galore import GaLore
from bench.methods.lora_fused import LoRAFused
from bench.methods.loreft import LoReFT
from bench.methods.options import Options, Unavailable
from bench.methods.s2ft import (
    S2FTAdditive,
    S2FTInplace,
    S2FTPermutedAdditive,
    S2FTPermutedInplace,
    S2FTUnfused,
)
from bench.methods.spiel import SpIEL, SpIELMA

# In the order of tables and figures.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Frozen, Full),
        *(LoRA, LoRAFP32, LoRAFused, DoRA),
        *(GaLore, LISA, LoReFT, SHiRA),
        *(SpIEL, SpIELMA),
        *(S2FTInplace, S2FTAdditive, S2FTPermutedInplace, S2FTPermutedAdditive, S2FTUnfused),
    )
}

__all__ = ["METHODS", "Budget", "Method", "Options", "Unavailable", "comparable"]
