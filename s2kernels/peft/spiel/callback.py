"""SpIEL in transformers' Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from s2kernels.peft.spiel.checkpoint import load_tuner, save_tuner
from s2kernels.peft.spiel.reselection import SpIELTuner


class SpIELCallback(TrainerCallback):
    """Runs a `SpIELTuner` along with a Trainer, and saves its state into every checkpoint.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SpIELCallback()],
                          optimizers=(make_optimizer(model, lr), None))

    resume_from: the checkpoint given to `trainer.train(resume_from_checkpoint=...)`. Needed where
    that is not the folder of that step in the Trainer's output_dir.
    """

    def __init__(self, adapter_name: str = "default", resume_from: str | Path | None = None):
        self.adapter_name, self.resume_from = adapter_name, resume_from
        self.tuner: SpIELTuner | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.tuner is not None:
            self.tuner.step()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.tuner is not None and state.is_world_process_zero:
            save_tuner(_checkpoint(args, state), self.tuner)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.tuner is not None:
            self.tuner.close()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the present step in the Trainer's output_dir."""
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
