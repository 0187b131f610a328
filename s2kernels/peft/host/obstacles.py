"""What in the rest of a model forbids writing into a weight."""

from collections import Counter

import torch
from torch import Tensor, nn

from s2kernels.peft.host.sharding import is_gathered


class Obstacles:
    """Weights that modules share, and FSDP, as they were at the last `look`. A copy looks anew."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._num_owners: Counter[int] | None = None
        self.sharded = False

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_num_owners": None}  # a copy has other parameters

    def look(self) -> None:
        """Look at the model as it is now."""
        parameters = self._model.named_parameters(remove_duplicate=False)
        self._num_owners = Counter(id(value) for _, value in parameters)
        self.sharded = is_gathered(self._model)

    def of(self, weight: Tensor) -> str | None:
        """Why nothing can be written into this weight; None if it can."""
        if self._num_owners is None:
            self.look()
        assert self._num_owners is not None
        if self.sharded:
            return "FSDP gathers the weights anew for each forward and backward"
        if not torch.compiler.is_compiling() and weight.is_inference():
            return "the weight was made in inference mode"
        owners = self._num_owners.get(id(weight), 1)
        return f"the weight is shared by {owners} modules" if owners > 1 else None


def refuse_export() -> None:
    """Raises ValueError under torch.export."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export would read the weights without what is written into them: merge the "
            "adapter, or give S2FT mode='additive' before the first forward"
        )
