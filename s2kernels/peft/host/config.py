"""What the configurations of both methods share: their type, which modules are meant, the card."""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from peft.config import PeftConfig

from s2kernels.adapter import TENSORS_NAME
from s2kernels.digests import are_digests, check_modules, digests, read_tensors
from s2kernels.peft.host.model_card import CardText, write_card


class MethodType(str):
    """A value like those of `peft.PeftType`, which is a closed enumeration."""

    value = property(str.__str__)
    name = property(str.__str__)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # PEFT takes the method's name from this


T = TypeVar("T")


def option(default: T, text: str) -> T:
    """A field with its help text, where PEFT's configurations have it."""
    return field(default=default, metadata={"help": text})


@dataclass
class AdapterConfig(PeftConfig):
    """The fields that choose modules. Each method says itself what `target_modules` may name.

    `get_peft_model` and its kin leave the fields as they are, so that one object serves several
    models. What a model makes of them, such as the names of the targets, is in `resolved`, and in
    what is saved. Where the very same object is given for another adapter of a model, as in
    `model.add_adapter("ref", model.peft_config["default"])`, the new one starts as a copy of the
    adapter that has it already: TRL's trainers so make their reference.

    Raises ValueError for layers_to_transform and layers_pattern where they would decide nothing,
    and for digests that are none.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = option(
        None, "Names of modules, or a regular expression, that are not to be trained."
    )
    layers_to_transform: list[int] | int | None = option(
        None, "Indices of the layers to train. Default: all."
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the list of layers, where layers_to_transform cannot guess it."
    )
    modules_to_save: list[str] | None = option(
        None, "Further modules that are trained and saved whole, such as a head."
    )
    digests: dict[str, str] | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "Not to be given: of a saved adapter, the digest of each of its tensors. The "
            "first tensors that are loaded must have them; then, or once it is saved, it is None. "
            "Set it to None to load others."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # by field, what it was and what the model made of it: the one that was last saved, or that
        # an adapter was last added to
        self.resolved: dict[str, tuple[Any, Any]] = {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} does not go with target_modules given as a regular expression, "
                        f"got {name}={getattr(self, name)!r}"
                    )
        if self.digests is not None:
            if not are_digests(self.digests):
                raise ValueError(
                    f"digests must be texts by the names of tensors, got {self.digests!r:.100}"
                )
            check_modules(self.digests, self.modules_to_save)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern needs layers_to_transform, got {self.layers_pattern!r} alone"
            )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict:
        """The fields in a file. Raises ValueError, which names it, for one that is damaged."""
        try:
            return super().from_json_file(path_json_file, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path_json_file} is damaged: {error}") from None

    def differences(self, other: "AdapterConfig") -> dict[str, tuple[Any, Any]]:
        """The fields in which `other` differs, with a copy of what is here and what is there."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: (copy.copy(mine), its) for name, (mine, its) in pairs.items() if mine != its}

    def to_dict(self) -> dict[str, Any]:
        """All fields, those in `resolved` as the model has them unless they were set since then."""
        saved = super().to_dict()
        for name, (given, resolved) in self.resolved.items():
            if saved[name] == given:
                saved[name] = resolved
        return saved

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, and into README.md how the adapter is loaded.

        Where PEFT calls it to save an adapter, the file has the digests of the tensors that PEFT
        has just written; else the tensors may be still to come, and it has none.
        """
        saved = copy.copy(self)
        tensors = Path(save_directory, TENSORS_NAME)
        # PEFT alone gives this argument, and after it has written the tensors
        complete = "auto_mapping_dict" in kwargs and tensors.is_file()
        saved.digests = None
        if complete:
            saved.digests = digests(read_tensors(tensors), self.modules_to_save)
        super(AdapterConfig, saved).save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.base_model_name_or_path, self.card_text())

    def card_text(self) -> CardText:
        """What the model card says of an adapter of this configuration."""
        raise NotImplementedError
