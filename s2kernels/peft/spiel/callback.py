"""SpIEL in transformers' Trainer, and its state in checkpoints.

So that training resumes in the middle of a window, a checkpoint holds what `SpIELTuner.state_dict`
says. The entries themselves are in the adapter, their states in that of the optimizer.

    spiel_tuner.json         steps done, selection, steps counted in the window by layer
    spiel_tuner.safetensors  for each layer, in the order of candidates:
        NAME.candidates      int32 or int64 (k,)
        NAME.total, .squares fp32 or fp64 (k,), where steps were counted
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from s2kernels.digests import read_tensors
from s2kernels.files import replacing
from s2kernels.peft.spiel.reselection import SpIELTuner

JSON_NAME = "spiel_tuner.json"
TENSORS_NAME = "spiel_tuner.safetensors"


class SpIELCallback(TrainerCallback):
    """Runs a `SpIELTuner` along with a Trainer, and saves its state into every checkpoint.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SpIELCallback()],
                          optimizers=(make_optimizer(model, lr), None))

    resume_from: the checkpoint given to `trainer.train(resume_from_checkpoint=...)`. Needed where
    that is not the folder of that step in the Trainer's output_dir.
    """

    tuner: SpIELTuner  # of the training that was last begun

    def __init__(self, adapter_name: str = "default", resume_from: str | Path | None = None):
        self.adapter_name, self.resume_from = adapter_name, resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises as `SpIELTuner` does, and ValueError where training resumes from a checkpoint
        without the state of its tuner.
        """
        tuner = SpIELTuner(kwargs["model"], kwargs["optimizer"], state.max_steps, self.adapter_name)
        if state.global_step:
            folder = self.resume_from or _checkpoint(args, state)
            hint = "the checkpoint that training resumes from goes into resume_from"
            try:
                load_tuner(folder, tuner)
            except ValueError as error:
                raise ValueError(f"{error}; {hint}") from None
            if tuner.steps != state.global_step:
                raise ValueError(
                    f"the Trainer resumes at step {state.global_step}, but {folder} is of step "
                    f"{tuner.steps}; {hint}"
                )
        self.tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuner.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            save_tuner(_checkpoint(args, state), self.tuner)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuner.close()


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


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the present step in the Trainer's output_dir."""
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
