"""The state of a SpIELTuner in a folder, so that training resumes in the middle of a window.

    spiel_tuner.json         steps done, steps counted in the window, names of the layers
    spiel_tuner.safetensors  for each layer, in the order of candidates:
        NAME.candidates      int32 or int64 (k,)
        NAME.total, .squares fp32 or fp64 (k,), where steps were counted

The entries themselves are in the adapter, their states in that of the optimizer.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from s2kernels.digests import read_tensors
from s2kernels.files import replacing
from s2kernels.peft.spiel.reselection import SpIELTuner

JSON_NAME = "spiel_tuner.json"
TENSORS_NAME = "spiel_tuner.safetensors"


def save_tuner(folder: str | Path, tuner: SpIELTuner) -> None:
    """Write the state of the tuner, between two steps, into the folder."""
    state = tuner.state_dict()
    tensors = state.pop("tensors")
    with replacing(folder) as temporary:
        (temporary / JSON_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / TENSORS_NAME)


def load_tuner(folder: str | Path, tuner: SpIELTuner) -> None:
    """Take up the state that `save_tuner` has written.

    Raises ValueError, before anything changes, if there is none, if it is damaged, or that of
    another model or selection.
    """
    for name in (JSON_NAME, TENSORS_NAME):
        if not Path(folder, name).is_file():
            raise ValueError(f"{folder} holds no state of a SpIELTuner: there is no {name}")
    path = Path(folder, JSON_NAME)
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    tensors = read_tensors(Path(folder, TENSORS_NAME))
    try:
        tuner.load_state_dict({**state, "tensors": tensors} if isinstance(state, dict) else state)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
