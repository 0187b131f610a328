"""S2FT and SpIEL as PEFT tuners: import this module, then use PEFT as always.

    from peft import get_peft_model
    from s2kernels.peft import S2FTConfig

    model = get_peft_model(model, S2FTConfig(heads=2, channels=0.02))

Importing it makes the methods known to PEFT, which needs that to load an adapter, too. SpIEL wants
to be called after every step of the optimizer: see `SpIELTuner`, `SpIELCallback`.
"""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from s2kernels.peft.host.saving import save_pretrained
from s2kernels.peft.s2ft.config import PEFT_TYPE, S2FTConfig
from s2kernels.peft.s2ft.linear import S2FTLinear
from s2kernels.peft.s2ft.model import S2FTModel
from s2kernels.peft.s2ft.placement import fsdp_placement
from s2kernels.peft.s2ft.report import report
from s2kernels.peft.s2ft.selection import indices_of, select_indices
from s2kernels.peft.spiel.callback import SpIELCallback
from s2kernels.peft.spiel.config import PEFT_TYPE as SPIEL_TYPE
from s2kernels.peft.spiel.config import SpIELConfig
from s2kernels.peft.spiel.layer import SpIELLinear
from s2kernels.peft.spiel.model import SpIELModel
from s2kernels.peft.spiel.reselection import SpIELTuner, make_optimizer, support_of

# PEFT's dictionaries are meant to be filled from outside, but typed for its own enumeration only.
_METHODS: tuple[tuple[Any, Any, Any], ...] = (
    (PEFT_TYPE, S2FTConfig, S2FTModel),
    (SPIEL_TYPE, SpIELConfig, SpIELModel),
)
for _type, _config, _model in _METHODS:
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _model
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = _model.prefix

__all__ = [
    "S2FTConfig",
    "S2FTLinear",
    "S2FTModel",
    "SpIELCallback",
    "SpIELConfig",
    "SpIELLinear",
    "SpIELModel",
    "SpIELTuner",
    "fsdp_placement",
    "indices_of",
    "make_optimizer",
    "report",
    "save_pretrained",
    "select_indices",
    "support_of",
]
