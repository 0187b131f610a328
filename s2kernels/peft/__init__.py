"""S2FT as a PEFT tuner: import this module, then use PEFT as always.

    from peft import get_peft_model
    from s2kernels.peft import S2FTConfig

    model = get_peft_model(model, S2FTConfig(heads=2, channels=0.02))

Importing it makes the method known to PEFT, which needs that to load an adapter, too.
"""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from s2kernels.peft.config import PEFT_TYPE, S2FTConfig
from s2kernels.peft.layer import S2FTLinear
from s2kernels.peft.model import S2FTModel
from s2kernels.peft.report import report
from s2kernels.peft.selection import indices_of, select_indices

# PEFT's dictionaries are meant to be filled from outside, but typed for its own enumeration only.
_ENTRIES: tuple[tuple[dict[Any, Any], Any], ...] = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, S2FTConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, S2FTModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, S2FTModel.prefix),
)
for _mapping, _value in _ENTRIES:
    _mapping[PEFT_TYPE] = _value

__all__ = ["S2FTConfig", "S2FTLinear", "S2FTModel", "indices_of", "report", "select_indices"]
