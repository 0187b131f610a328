"""Mixed batches: which adapter each row that reaches a layer takes."""

from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class Rows(list[str]):
    """The adapter of each row of a batch, "__base__" for none. A beam search repeats each row
    `beams` times: for a decoder, not for an encoder.
    """

    def __init__(self, names: list[str], beams: int = 1) -> None:
        super().__init__(names)
        self.beams = beams

    def of(self, x: Tensor, joined: bool = False) -> list[str]:
        """The adapter of each row of x. joined: x (M, K) may have the tokens of a row one after the
        other, as in the FFN of OPT.

        Raises ValueError for an x whose rows are not those of the batch.
        """
        times, rest = divmod(len(x), len(self)) if self else (0, len(x))
        if rest or not (times in (1, self.beams) or (joined and x.ndim == 2 and times)):
            raise ValueError(
                f"adapter_names must name an adapter for each of the {len(x)} rows of the batch, "
                f"got {len(self)}"
            )
        return [name for name in self for _ in range(times)]


def hook_whole_modules(model: nn.Module, rows: Rows) -> list[Any]:
    """Have the modules_to_save of `model` go by their rows, too, until the handles are removed."""
    give = partial(_give_adapter_names, rows=rows)
    wrappers = [
        module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    return [module.register_forward_pre_hook(give, with_kwargs=True) for module in wrappers]


def _give_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], rows: Rows
) -> tuple[tuple, dict[str, Any]]:
    names = rows.of(args[0]) if args and isinstance(args[0], Tensor) else rows
    return args, kwargs | {"adapter_names": names}
