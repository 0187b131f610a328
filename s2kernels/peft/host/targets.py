"""Which modules a configuration means, where PEFT alone would not find the same ones every time."""

from collections.abc import Mapping
from copy import copy
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

# Modules that PEFT trains whole for a task, and names only after the targets are chosen.
_HEADS = {"TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def plain_name(name: str) -> str:
    """The name of a module, or of a tensor, as it is where nothing is compiled. What is compiled
    answers to it, too.
    """
    return name.replace("_orig_mod.", "")


def names_for_peft(model: nn.Module, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A state_dict of plain names, with the names by which PEFT looks for its modules."""
    its = {plain_name(name): name.removeprefix("_orig_mod.") for name, _ in model.named_modules()}
    parts = ((*name.rpartition(f".{prefix}"), value) for name, value in state.items())
    return {its.get(name, name) + dot + leaf: value for name, dot, leaf, value in parts}


def name_all_linear(model: nn.Module, config: Any) -> None:
    """Put the names of the layers in the place of target_modules="all-linear": without the head, as
    PEFT has it, and of layers_to_transform alone, which PEFT would not ask for full names.

    Raises ValueError where layers_to_transform leaves none.
    """
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    _maybe_include_all_linear_layers(config, model._modules.get("_orig_mod") or model)
    heads = _HEADS.get(config.task_type, set())
    names = map(plain_name, config.target_modules)
    found = {name for name in names if heads.isdisjoint(name.split("."))}
    if config.layers_to_transform is not None:
        every = found
        found = {name for name in every if _is_in_layers(config, name)}
        if every and not found:
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} names no layer of the model "
                f"that has linear layers (layers_pattern={config.layers_pattern!r})"
            )
        config.layers_to_transform = config.layers_pattern = None
    config.target_modules = found


def _is_in_layers(config: Any, name: str) -> bool:
    by_suffix = copy(config)
    by_suffix.target_modules = {name.rpartition(".")[2]}
    by_suffix.exclude_modules = by_suffix.modules_to_save = None  # which PEFT asks for by itself
    # PEFT takes for granted what is in target_modules, and wants something in front of a layer
    return bool(check_target_module_exists(by_suffix, f"model.{name}"))
