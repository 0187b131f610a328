"""How a keeper gets to know what is done to its model: forwards, state_dict, load_state_dict."""

import inspect
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from s2kernels.peft.host.obstacles import refuse_export
from s2kernels.peft.host.uncalled import FirstForward
from s2kernels.peft.host.weights import WeightKeeper

_HEADS = "_s2kernels_heads"  # of a KV cache, the order of its heads: `Arrangement.heads`


class ModelHooks:
    """The hooks on the model of a keeper, and the forward in the place of that of its class.

    tuner: PEFT's model around it. writes: whether anything is ever written or permuted. If not, the
    model keeps its own forward, which torch.compile can take in one graph.
    """

    def __init__(self, keeper: WeightKeeper, tuner: nn.Module, writes: bool = True) -> None:
        self.keeper = keeper
        self._handles: list[Any] = [FirstForward(keeper, tuner, keeper.model)]
        for module in self._owners():
            self._handles += [
                module.register_state_dict_pre_hook(self._before_state_dict),
                module.register_state_dict_post_hook(_AfterStateDict(keeper)),
                module.register_load_state_dict_pre_hook(self._before_load_state_dict),
            ]
        if writes:
            self._handles.append(keeper.model.register_forward_pre_hook(self._refuse_replica))
            keeper.model.forward = ModelForward(keeper)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self._handles:
            handle.remove()
        forward = vars(self.keeper.model).get("forward")
        if isinstance(forward, ModelForward) and forward.keeper is self.keeper:
            forward.put_back()

    def _owners(self) -> list[nn.Module]:
        """The model, all of its parts that hold a weight of the layers, and the base layers."""
        paths = [layer.name.split(".") for layer in self.keeper.layers]
        parts = {part for path in paths for part in accumulate(path, "{}.{}".format)}
        model = self.keeper.model
        bases = {layer.get_base_layer() for layer in self.keeper.layers}
        return [model, *map(model.get_submodule, sorted(parts)), *bases]

    def _refuse_replica(self, module: nn.Module, args: Any) -> None:
        if module is not self.keeper.model:
            raise RuntimeError(
                "nn.DataParallel copies the weights before an adapter is written into them: use "
                "DistributedDataParallel"
            )

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if _order_is_needed(self.keeper):
            self.keeper.restore()  # see _AfterStateDict
        else:
            self.keeper.release()
        for layer in self.keeper.layers:  # the weights hold W0
            self.keeper.notice_weight(layer)
            layer.known.renew()

    def _before_load_state_dict(self, module: nn.Module, *args: Any) -> None:
        if self.keeper.merged:
            raise RuntimeError(
                "weights cannot be loaded while adapters are merged: call unmerge_adapter first"
            )
        self.keeper.release()
        self.keeper.changed()


class _AfterStateDict:
    """Copies the weights that are written to, where other threads use the model: what they write
    later would change what this one is about to save. So it does where the order of permuted
    weights is still needed: the copies are in the order of the checkpoint.
    """

    def __init__(self, keeper: WeightKeeper) -> None:
        self.keeper = keeper

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        keeper = self.keeper
        arrangement = keeper.arrangement
        if arrangement is not None and _order_is_needed(keeper):
            with keeper.forwards.alone():
                keeper.restore()
                arrangement.put_back_copies(state)
            return
        if not keeper.forwards.elsewhere or keeper.forwards.here:
            return
        with keeper.forwards.alone():
            keeper.release()
            all_move = arrangement is not None and arrangement.moves(keeper.layers)
            written = {layer.weight.data_ptr() for layer in keeper.layers}
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.is_meta or not name.startswith(prefix):
                    continue
                if all_move or value.data_ptr() in written:
                    state[name] = value.detach().clone()


def _order_is_needed(keeper: WeightKeeper) -> bool:
    """Whether weights must stay permuted: this thread is inside a forward, as where a signal's
    handler saves, or the backward of one is to come.
    """
    moved = keeper.arrangement is not None and keeper.arrangement.moved
    return moved and (keeper.forwards.here or keeper.forwards.pending)


class ModelForward:
    """The forward of a model whose weights are written to: that of its class, between `begin` and
    `end` of its keeper. What replaces it later can call it for as long as it likes.

    inner: a forward in the place of that of the class; None for that.
    """

    def __init__(self, keeper: WeightKeeper) -> None:
        model = keeper.model
        self.keeper: WeightKeeper | None = keeper
        self.model = model
        self.inner = vars(model).get("forward")
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        keeper, failed = self.keeper, True
        if keeper is None or not keeper.attached:  # where it was wrapped, nobody could put it back
            return self._forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            refuse_export()
            if keeper.writes is None:
                torch.compiler.disable(keeper.prepare)()
            keeper.write()
            return self._forward(*args, **kwargs)
        keeper.begin()
        try:
            moves, cache = keeper.arrangement, kwargs.get("past_key_values")
            if moves is not None and isinstance(cache, Cache):
                _check_heads(cache, moves.heads)
            output = self._forward(*args, **kwargs)
            if moves is not None:
                _note_heads(output, moves.heads)
                if moves.moved:
                    keeper.forwards.expect_backward(output)
            failed = False
            return output
        finally:
            keeper.end(failed)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def put_back(self) -> None:
        """Undo the replacement."""
        self.keeper = None
        if self.inner is None:
            del self.model.forward
        else:
            self.model.forward = self.inner  # type: ignore[method-assign]


def _check_heads(cache: Any, heads: dict) -> None:
    """Raises ValueError for a KV cache whose heads are known to be in another order than `heads`;
    an empty one takes that on.
    """
    known = vars(cache).get(_HEADS)
    if known is not None and known != heads and cache.get_seq_length():
        raise ValueError(
            "past_key_values was made when the heads were in another order: layout='permute' moves "
            "them, and adding, merging or deleting an adapter moves them back; start a new cache"
        )
    setattr(cache, _HEADS, heads)


def _note_heads(output: Any, heads: dict) -> None:
    """Note in the KV caches of a model's output in which order their heads are."""
    parts = output.values() if isinstance(output, dict) else output
    for part in parts if isinstance(output, (dict, tuple)) else ():
        if isinstance(part, Cache):
            setattr(part, _HEADS, heads)
