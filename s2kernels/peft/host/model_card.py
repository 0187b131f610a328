"""The part of an adapter's model card that says what it is and how to load it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from s2kernels.files import replacing


@dataclass(frozen=True)
class CardText:
    """What a method says of an adapter: heading, tags of the card, and text around the example."""

    heading: str
    tags: tuple[str, ...]
    summary: str
    closing: str


def write_card(folder: str | Path, base_model: str | None, text: CardText) -> None:
    """Add the section to the README.md in `folder`, or make one; a second time replaces it."""
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *text.tags})
    before, _, rest = card.text.partition(text.heading)
    _, _, after = rest.partition("\n## ")
    after = f"\n## {after}" if after else ""
    card.text = f"{before.rstrip()}\n\n{text.heading}\n\n{_section(base_model, text)}{after}"
    with replacing(folder) as temporary:
        (temporary / "README.md").write_text(str(card), "utf-8")


def _section(base_model: str | None, text: CardText) -> str:
    return f"""{text.summary}

```python
import s2kernels.peft  # makes the method known to PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base_model or "PATH OF THE BASE MODEL"!r})
model = PeftModel.from_pretrained(model, "PATH OF THIS FOLDER")
```

{text.closing}
"""
