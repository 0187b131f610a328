"""What tests do to the files of saved adapters."""

import json
from pathlib import Path

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def edit_config(folder: Path, **fields) -> None:
    """Set fields in the adapter's configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without_digests(folder: Path) -> None:
    """Make it an adapter as earlier versions wrote them, whose tensors are loaded unchecked."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("digests", None)
    (folder / CONFIG).write_text(json.dumps(config))
