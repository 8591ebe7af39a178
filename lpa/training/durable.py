"""DurableTrainer: a Trainer that loses no finished step to a kill, a full disk, a stop or another rank's failure."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..files import staged, write_json, writing
from ..models import name_base
from ..run_folder import BOUND, STATE, check_unused, checkpoint_folder, updates_of
from .checkpoint import UNFINISHED, checked, last_good, publish, remove_old, remove_unfinished
from .ranks import agree, from_main
from .resuming import check_resumed

logger = logging.getLogger(__name__)


class StopTraining(Exception):
    """Raised inside the loop to leave it where a checkpoint may be made."""


class DurableTrainer(Trainer):
    """A `Trainer` with checkpoints that are whole or not there, and with ranks that stop and fail together.

    A checkpoint is written beside its place, synced, and then renamed. It holds a list of its files and their hashes,
    so that a resumed run finds damage. `resume_from_checkpoint=True` takes the newest good one. Only rank 0 names,
    lists and removes checkpoints.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.interrupted = self._stop_asked = False
        self._writing: Path | None = None  # where a checkpoint is written at the moment
        self._saved: int | None = None  # the model update of the last checkpoint
        self._wrote = False  # something into the output folder

    # ---- stopping --------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Stop at the end of the last whole step and save it. A request to one rank stops all."""
        self._stop_asked = True

    def agree(self, error: Exception | None = None) -> None:
        """Let the ranks learn of each other's failures and stops.

        Raises:
            StopTraining: on every rank, where one was asked to stop.
            Exception: `error`, and RankError with its message on the other ranks.
        """
        if agree(self.accelerator, error, self._stop_asked):
            raise StopTraining

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """As the base class. After `request_stop` it returns early, with `interrupted` True and a checkpoint saved.

        Raises:
            CheckpointError: the checkpoint is damaged. With True, a warning names a damaged one, and the one before it
                is taken.
            ValueError: `resume_from_checkpoint=True` and there is no good checkpoint; the checkpoint was made with
                other settings; or nothing is resumed and the output folder holds an earlier run.
            lpa.files.WriteError: a checkpoint cannot be written.
        """
        self.interrupted = self._stop_asked = False
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is None and not self._wrote:
            from_main(self.accelerator, lambda: check_unused(Path(self.args.output_dir)))
        if checkpoint is not None:
            from_main(self.accelerator, lambda: check_resumed(checkpoint, self.kept_settings()))
        self._saved = None if checkpoint is None else updates_of(checkpoint)
        if self.is_world_process_zero():
            remove_unfinished(Path(self.args.output_dir))
        try:
            return super().train(None if checkpoint is None else str(checkpoint), **kwargs)
        except StopTraining:
            self.interrupted = not self.control.should_training_stop  # else a callback has stopped it
            self.model.zero_grad(set_to_none=True)
            if self.state.global_step and self._saved != self.state.global_step:
                self._save_checkpoint(self.model, None)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, float("nan"), {})

    def checkpoint_folder(self, global_step: int) -> Path:
        """Where the checkpoint of a model update is or would be."""
        return checkpoint_folder(Path(super()._get_output_dir(None)), global_step)

    def kept_settings(self) -> dict[str, Any]:
        """Settings that a checkpoint keeps; a resumed run must have the same."""
        return {}

    def last_checkpoint(self) -> Path | None:
        """The run's newest good checkpoint. A warning names damaged ones."""
        return from_main(self.accelerator, lambda: last_good(Path(self.args.output_dir)))

    def _checkpoint(self, asked: Any) -> Path | None:
        if not asked:
            return None
        if asked is not True:
            return from_main(self.accelerator, lambda: checked(Path(asked)))
        found = self.last_checkpoint()
        if found is None:
            raise ValueError(f"there is no good checkpoint in {self.args.output_dir} to go on from")
        return found

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        target = self.checkpoint_folder(step)
        run = target.parent
        error: Exception | None = None
        try:
            with writing(target.name, run, self._still_there(step)):
                self._writing = run / UNFINISHED
                super()._save_checkpoint(model, trial)
                self._name_best(run / UNFINISHED, run)
                if self.args.should_save:
                    write_json(run / UNFINISHED / target.name / BOUND, self.kept_settings())
        except Exception as raised:  # of any kind: the other ranks must learn of it
            error = raised
            if self.is_fsdp_enabled:  # other ranks wait for this one's shards, and would not hear
                raise
        finally:
            self._writing = None
        self._settled(error, run)
        if self.args.should_save:
            try:
                with writing(target.name, run, self._still_there(step)):
                    publish(run / UNFINISHED / target.name, target)
                    remove_old(run, self.args.save_total_limit, self.state.best_model_checkpoint)
            except Exception as raised:
                error = raised
        self._settled(error, run)
        self._saved, self._wrote = step, True

    def _name_best(self, written: Path, run: Path) -> None:
        """Where the best checkpoint is the one being written, call it what it will be called."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == written:
            self.state.best_model_checkpoint = str(run / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(written / Path(best).name / STATE))

    def _settled(self, error: Exception | None, run: Path) -> None:
        try:
            agree(self.accelerator, error)  # every rank has written its part
        except Exception:
            if self.args.should_save:
                remove_unfinished(run)
            raise

    def _still_there(self, step: int) -> str:
        saved = None if self._saved is None else self.checkpoint_folder(self._saved).name
        last = "there is no checkpoint yet" if saved is None else f"{saved} is there"
        return f"{last}, and the steps after it are lost; put that right and resume"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the base class; the files appear whole, and of sharded weights only the trained ones are gathered.

        Raises:
            lpa.files.WriteError: the files cannot be written; the folder keeps its earlier files.
        """
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:  # a checkpoint's, which appears as a whole
            return self._write_model(folder, self.trained_state())
        state, error = self.trained_state(), None  # type: tuple[Any, Exception | None]
        try:
            with writing("the model", folder), staged(folder) if self.args.should_save else nullcontext(folder) as part:
                self._write_model(part, state)
        except Exception as raised:  # of any kind: the other ranks must learn of it
            error = raised
        agree(self.accelerator, error)
        self._wrote = True
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _write_model(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        if state is None:
            super().save_model(str(folder), _internal_call=True)
        else:
            self._save(str(folder), state_dict=state)
        if self.args.should_save:
            name_base(folder)

    def trained_state(self) -> dict[str, Tensor] | None:
        """The weights to save, gathered on the main rank (empty on others); None where they are not sharded.

        Of a model with adapters these alone: the base model's weights stay where they are.
        """
        if not self.is_fsdp_enabled:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(self.model, "peft_config")
        )
        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return state
