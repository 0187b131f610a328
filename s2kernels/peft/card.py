"""The part of an adapter's model card that says what it is and how to load it."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from s2kernels.files import replacing

if TYPE_CHECKING:
    from s2kernels.peft.config import S2FTConfig

HEADING = "## S2FT adapter"
TAGS = ("s2ft", "arxiv:2412.06289")


def write_card(folder: str | Path, config: "S2FTConfig") -> None:
    """Adds the section to the README.md in `folder`, or makes one; a second time replaces it."""
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *TAGS})
    before, _, rest = card.text.partition(HEADING)
    _, _, after = rest.partition("\n## ")
    after = f"\n## {after}" if after else ""
    card.text = f"{before.rstrip()}\n\n{HEADING}\n\n{_section(config)}{after}"
    with replacing(folder) as temporary:
        (temporary / "README.md").write_text(str(card), "utf-8")


def _section(config: "S2FTConfig") -> str:
    base = config.base_model_name_or_path or "PATH OF THE BASE MODEL"
    chosen = f"selection {config.selection}, heads {config.heads}, channels {config.channels}"
    chosen += f", seed {config.seed}"
    if config.indices is not None and (config.selection, config.scope) == ("random", "layer"):
        chosen = "given by their indices"  # a random selection within layers leaves none behind
    return f"""Structured sparse fine-tuning: of every block some heads and channels were trained
({chosen}). The tensors are in the order of the checkpoint's channels.

```python
import s2kernels.peft  # makes the method known to PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "PATH OF THIS FOLDER")
```

Servers that take LoRA adapters take this one after `s2kernels export-lora`, exactly.
"""
