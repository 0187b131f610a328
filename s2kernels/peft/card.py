"""The part of an adapter's model card that says what it is and how to load it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from s2kernels.files import replacing

if TYPE_CHECKING:
    from s2kernels.peft.config import S2FTConfig
    from s2kernels.peft.spiel.config import SpIELConfig
    from s2kernels.peft.targets import TargetsConfig


@dataclass(frozen=True)
class _Method:
    heading: str
    tags: tuple[str, ...]
    summary: Callable[[Any], str]  # of its configuration
    closing: str


def write_card(folder: str | Path, config: "TargetsConfig") -> None:
    """Adds the section to the README.md in `folder`, or makes one; a second time replaces it."""
    method = _METHODS[str(config.peft_type)]
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *method.tags})
    before, _, rest = card.text.partition(method.heading)
    _, _, after = rest.partition("\n## ")
    after = f"\n## {after}" if after else ""
    card.text = f"{before.rstrip()}\n\n{method.heading}\n\n{_section(method, config)}{after}"
    with replacing(folder) as temporary:
        (temporary / "README.md").write_text(str(card), "utf-8")


def _section(method: _Method, config: "TargetsConfig") -> str:
    base = config.base_model_name_or_path or "PATH OF THE BASE MODEL"
    return f"""{method.summary(config)}

```python
import s2kernels.peft  # makes the method known to PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "PATH OF THIS FOLDER")
```

{method.closing}
"""


def _s2ft(config: "S2FTConfig") -> str:
    chosen = f"selection {config.selection}, heads {config.heads}, channels {config.channels}"
    chosen += f", seed {config.seed}"
    if config.indices is not None and (config.selection, config.scope) == ("random", "layer"):
        chosen = "given by their indices"  # a random selection within layers leaves none behind
    return f"""Structured sparse fine-tuning: of every block some heads and channels were trained
({chosen}). The tensors are in the order of the checkpoint's channels."""


def _spiel(config: "SpIELConfig") -> str:
    num = config.num_tunable_weights
    budget = f"density {config.density}" if num is None else f"a budget of {num:,}"
    return f"""Sparse fine-tuning: scattered entries of the linear layers' weights were trained
({budget}, selection {config.selection}, seed {config.seed})."""


_METHODS = {
    "S2FT": _Method(
        "## S2FT adapter",
        ("s2ft", "arxiv:2412.06289"),
        _s2ft,
        "Servers that take LoRA adapters take this one after `s2kernels export-lora`, exactly.",
    ),
    "SPIEL": _Method(
        "## SpIEL adapter",
        ("spiel", "arxiv:2401.16405"),
        _spiel,
        "`s2kernels merge` makes one model of base and adapter, which loads without s2kernels.",
    ),
}
