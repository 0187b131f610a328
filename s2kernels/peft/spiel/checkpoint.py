"""The state of a SpIELTuner in a folder, so that training resumes in the middle of a window.

    spiel_tuner.json         steps done, steps counted in the window, names of the layers
    spiel_tuner.safetensors  for each layer, in the order of candidates:
        NAME.candidates      int32 or int64 (k,)
        NAME.total, .squares fp32 or fp64 (k,), where steps were counted

The entries themselves are in the adapter, their states in that of the optimizer.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from s2kernels.files import replacing
from s2kernels.peft.spiel.reselection import WINDOW_FIELDS, SpIELTuner

JSON_NAME = "spiel_tuner.json"
TENSORS_NAME = "spiel_tuner.safetensors"


def save_tuner(folder: str | Path, tuner: SpIELTuner) -> None:
    """Write the state of the tuner, between two steps, into the folder."""
    window: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for layer, watch in zip(tuner.layers, tuner.watches, strict=False):
        if watch.candidates is not None:
            window[layer.name] = watch.steps
        for field in WINDOW_FIELDS:
            if (value := getattr(watch, field)) is not None:
                tensors[f"{layer.name}.{field}"] = value
    state = {"steps": tuner.steps, "selection": tuner.selection, "window": window}
    with replacing(folder) as temporary:
        (temporary / JSON_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / TENSORS_NAME)


def load_tuner(folder: str | Path, tuner: SpIELTuner) -> None:
    """Take up the state that `save_tuner` has written.

    Raises ValueError, before anything changes, if there is none, or it is that of another model or
    selection.
    """
    path = Path(folder, JSON_NAME)
    if not path.is_file():
        raise ValueError(f"{folder} holds no state of a SpIELTuner: there is no {JSON_NAME}")
    state = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(Path(folder, TENSORS_NAME))
    if state["selection"] != tuner.selection:
        raise ValueError(
            f"{path} is of selection={state['selection']!r}, the tuner's is {tuner.selection!r}"
        )
    sizes = {layer.name: len(tuner.index_of(layer)) for layer in tuner.layers}
    for key, value in tensors.items():
        name, _, field = key.rpartition(".")
        if field not in WINDOW_FIELDS or len(value) != sizes.get(name):
            raise ValueError(
                f"{Path(folder, TENSORS_NAME)} does not go with the model: {key} has "
                f"{len(value)} entries, the layer {sizes.get(name)}"
            )
    tuner.resume(state["steps"], state["window"], tensors)
