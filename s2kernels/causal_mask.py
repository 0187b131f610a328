"""No attention mask in a recorded step that needs none.

Where every token sees all that came before it, transformers hands attention no mask and
is_causal=True, which Flash and cuDNN attention need. It looks at the numbers of a given mask, and
at those of the positions, which may be of packed sequences. While a CUDA graph is captured nobody
can look, so it computes a mask of (batch, 1, tokens, tokens) in any case: transformers below 5.23
always, later ones without a cache. Each replay of such a step would compute the mask anew, and read
it in every layer by a slower kernel.

Nobody has to look where nothing was given: without a mask no token is padding, and positions that
a model counts itself are of one sequence each.
"""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_PACKED = "find_packed_sequence_indices"


@contextmanager
def no_needless_mask(model: nn.Module) -> Iterator[None]:
    """Within, a forward of `model` under capture computes masks only from what it was given.

    It computes one from an attention_mask, and from position_ids without an attention_mask. Models
    that are not of transformers are left as they are, and those that torch.compile has compiled:
    to it, functions of transformers that are others for a while are a reason to compile anew.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None or any(map(_is_compiled, model.modules())):
        yield
        return
    from transformers import PreTrainedModel

    originals = {name: getattr(masking, name) for name in ("is_tracing", _PACKED)}
    thread = threading.get_ident()
    was_given = False

    def notice(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal was_given
        named = inspect.signature(type(module).forward).bind_partial(module, *args).arguments
        was_given = was_given or (named | kwargs).get("position_ids") is not None

    def is_tracing(x: Any = None) -> bool:
        return x is not None and originals["is_tracing"](x)

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        if was_given or threading.get_ident() != thread:
            return originals[_PACKED](position_ids)
        return None

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                hook = module.register_forward_pre_hook(notice, with_kwargs=True)
                undo.callback(hook.remove)
        for name, original in originals.items():
            undo.callback(setattr, masking, name, original)
        masking.is_tracing = is_tracing
        masking.find_packed_sequence_indices = find_packed_sequence_indices
        yield


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)` or `module.compile()`."""
    return hasattr(module, "_torchdynamo_orig_callable") or bool(module._compiled_call_impl)
