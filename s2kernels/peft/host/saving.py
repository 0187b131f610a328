"""Saving an adapter whole or not at all, also one whose tensors are spread over processes."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from s2kernels.files import replacing
from s2kernels.peft.host.sharding import is_gathered


def save_pretrained(model: PeftModel, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained`, which writes into `folder` itself, by way of a temporary folder.

    If it fails or is interrupted, the adapter that was in `folder` is as it was; see
    `s2kernels.files.replacing`. options: those of PEFT's method, selected_adapters and others.

    Where the model is sharded by FSDP2 or a tp_plan, all processes must call it. The first one
    writes what a single process would have written, and all of them return, or fail, when that is
    done. With a state_dict among the options nothing is gathered, and one process may call it.

    Raises what PEFT's method raises, and ValueError if `folder` is a file, and for a model in FSDP1
    without a state_dict. A process that has not written raises RuntimeError if the first one fails.
    """
    folder = Path(folder)
    state = None if options.get("state_dict") is not None else gathered_state(model)
    if state is None:
        _write(model, folder, options)
        return
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            _write(model, folder, options | {"state_dict": state})
        except Exception as caught:
            error = caught
    said = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    if said[0] is not None:
        raise RuntimeError(f"process 0 could not save the adapter: {said[0]}")


def _write(model: PeftModel, folder: Path, options: dict[str, Any]) -> None:
    if folder.is_file():
        raise ValueError(f"folder must be a folder, {folder} is a file")
    with replacing(folder) as temporary:
        for name in ("", *model.peft_config):  # PEFT adds to the model cards that are there
            card = folder / name / "README.md"
            if card.is_file():
                copy = temporary / name / "README.md"
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(card, copy)
        model.save_pretrained(str(temporary), **options)


def gathered_state(model: PeftModel) -> dict[str, Tensor] | None:
    """What PEFT may save of a model that is sharded, whole and on the CPU: not the frozen base.
    All processes must call it; the first one gets the tensors, the others none. None where the
    model is not sharded, and PEFT saves it by itself.

    Raises ValueError for a model in FSDP1.
    """
    if not (is_gathered(model) or any(isinstance(p, DTensor) for p in model.parameters())):
        return None
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    own = (f".{model.base_model.prefix}", ".modules_to_save.")
    state: dict[str, Any] = dict(get_model_state_dict(model))
    if not any(isinstance(value, DTensor) for value in state.values()):
        raise ValueError("a model in FSDP1 is saved with state_dict=, its full state")
    gathered = {}
    for name, value in state.items():
        if name in frozen and not any(mark in name for mark in own):
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            gathered[name] = whole.cpu()
    return gathered
