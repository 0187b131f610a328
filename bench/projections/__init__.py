"""The linear layers of one decoder layer on a `bench.operators.Book`, as each method has them."""

from bench.projections.adapters import DoRA, LoRA, LoRAFP32
from bench.projections.entries import SHiRA, SpIEL
from bench.projections.lora_fused import LoRAFused
from bench.projections.loreft import LoReFT
from bench.projections.plain import Plain
from bench.projections.s2ft import S2FTAdditive, S2FTInplace, S2FTUnfused

PROJECTIONS: dict[str, type[Plain]] = {
    "frozen": Plain,
    "full": Plain,
    "lora": LoRA,
    "lora_fp32": LoRAFP32,
    "lora_fused": LoRAFused,
    "dora": DoRA,
    "galore": Plain,
    "lisa": Plain,
    "loreft": LoReFT,
    "shira": SHiRA,
    "spiel": SpIEL,
    "spiel_ma": SpIEL,
    "s2ft_inplace": S2FTInplace,
    "s2ft_unfused": S2FTUnfused,
    "s2ft_additive": S2FTAdditive,
}

__all__ = ["PROJECTIONS", "Plain"]
