"""Saving an adapter whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from s2kernels.files import replacing


def save_pretrained(model: PeftModel, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained`, which writes into `folder` itself, by way of a temporary folder.

    If it fails or is interrupted, the adapter that was in `folder` is as it was; see
    `s2kernels.files.replacing`. options: those of PEFT's method, selected_adapters and others.

    Raises what PEFT's method raises, and ValueError if `folder` is a file.
    """
    folder = Path(folder)
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
