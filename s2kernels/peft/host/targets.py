"""Which modules a configuration means, where PEFT alone would not find the same ones every time."""

from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

# Modules that PEFT trains whole for a task, and names only after the targets are chosen.
_HEADS = {"TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def name_all_linear(model: nn.Module, config: Any) -> None:
    """Put the names of the layers in the place of target_modules="all-linear": without the head, as
    PEFT has it.
    """
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    _maybe_include_all_linear_layers(config, model)
    heads = _HEADS.get(config.task_type, set())
    config.target_modules = {
        name for name in config.target_modules if heads.isdisjoint(name.split("."))
    }
