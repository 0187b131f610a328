"""GaLore (arXiv 2403.03507), by galore-torch: AdamW on gradients projected to a low rank."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.measure import memory
from bench.methods.base import Method
from bench.methods.options import Options, Unavailable


class GaLore(Method):
    """All linear layers of the blocks are trained; dense gradients, low-rank optimizer states.

    Every `galore_gap` steps, the first included, the projections are taken from singular value
    decompositions of the gradients. Embedding, head and norms stay frozen, as under the adapters:
    with them GaLore would train hundreds of millions of parameters densely. All gradients are alive
    together, to be accumulated and clipped; a variant without that needs less memory.
    """

    name = "galore"

    def check(self, options: Options) -> None:
        if importlib.util.find_spec("galore_torch") is None:
            raise Unavailable("galore-torch is not installed")

    def attach(self, model: PreTrainedModel) -> nn.Module:
        self.period = self.budget.galore_gap
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(True)
        return model

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        group = {
            "params": self.trained(),
            "rank": self.budget.galore_rank,
            "update_proj_gap": self.budget.galore_gap,
            "scale": 0.25,  # that of GaLore's README
            "proj_type": "std",
        }
        return _adamw()([group], lr=lr, betas=(0.9, 0.95), no_deprecation_warning=True)

    def trained_parameters(self) -> int:
        """The dimension of the subspaces in which the weights move, as GaLore's users count."""
        return sum(self.budget.galore_rank * max(weight.shape) for weight in self.trained())

    def state_tensors(self) -> Iterator[Tensor]:
        yield from super().state_tensors()
        for state in self.optimizer.state.values():
            yield from memory.tensors_in(vars(state["projector"]))

    def make_due(self) -> None:
        for state in self.optimizer.state.values():
            state["projector"].ortho_matrix = None

    def is_due(self) -> bool:
        state = next(iter(self.optimizer.state.values()), None)  # the others are as far as this one
        if state is None or state["projector"].ortho_matrix is None:
            return True
        return state["step"] % self.period == 0


def _adamw() -> type[torch.optim.Optimizer]:
    """AdamW of galore_torch, without what the package imports beside it.

    Its __init__ wants bitsandbytes, large and compiled, for an 8-bit optimizer that is not used
    here. So the module is imported from a package of the same place that is empty.
    """
    package = ModuleType("galore_torch")
    package.__path__ = importlib.util.find_spec("galore_torch").submodule_search_locations
    sys.modules["galore_torch"] = package
    try:
        return importlib.import_module("galore_torch.adamw").AdamW
    finally:
        del sys.modules["galore_torch"]
