"""The trainer's callbacks: stops wait for whole LPA steps; canaries are measured, and the best step is kept."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from . import selection
from .canaries import Canaries

logger = logging.getLogger(__name__)


class WholeSteps(TrainerCallback):
    """What callbacks and transformers' loop ask for within an LPA step waits for its end.

    The loop leaves at once where a stop is asked for, and would lose the update's gradients and the LPA step's other
    updates. A checkpoint within an LPA step would need its attacks.
    """

    def __init__(self) -> None:
        self.save = self.evaluate = self.stop = False  # what waits

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save = self.evaluate = self.stop = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop |= control.should_training_stop or control.should_epoch_stop
        control.should_training_stop = control.should_epoch_stop = False

    on_substep_end = on_step_begin

    def put_off(self, control: Any) -> None:
        """Let everything that is asked for wait."""
        self.on_step_begin(None, None, control)
        self.save |= control.should_save
        self.evaluate |= control.should_evaluate
        control.should_save = control.should_evaluate = False

    def ask_again(self, control: Any) -> None:
        """Ask for what has waited, at the end of an LPA step."""
        control.should_save |= self.save
        control.should_evaluate |= self.evaluate
        control.should_training_stop |= self.stop
        self.save = self.evaluate = self.stop = False


class CanaryCallback(TrainerCallback):
    """Asks the canaries before training, every `canary_steps` LPA steps and at the end.

    Decisions follow from the numbers in the trainer's log, which checkpoints hold. So a resumed run decides as an
    uninterrupted one does. Every rank asks, because under FSDP2 each holds a part of the model, and all use rank 0's
    numbers. Rotation spares the checkpoint of the best step, and the model has its weights after training.

    Args:
        trainer: an `LPATrainer`, which the callback is added to.
        canaries: what to ask.
    """

    def __init__(self, trainer: Any, canaries: Canaries) -> None:
        self.trainer, self.canaries = trainer, canaries
        args = trainer.args
        self.limits = selection.Limits(args.canary_max_refusal, args.canary_max_perplexity, args.canary_patience)
        self.stopped = ""

    @property
    def entries(self) -> list[dict[str, float]]:
        """The measurements so far, the first of them of the model before training."""
        return selection.entries_of(self.trainer.state.log_history)

    def record(self) -> dict[str, Any]:
        """For a record, after `train`: what was asked and found, the best step, the frontier, why the run stopped."""
        entries = self.entries
        points = [
            {"lpa_step": int(e["lpa_step"]), "safety": selection.safety(e), "utility": selection.utility(e)}
            for e in selection.frontier(entries)
        ]
        best = int(selection.best(entries, self.limits)["lpa_step"])
        kept = best if self.trainer.args.canary_keep_best else self.trainer.lpa_step
        return {"asked": self.canaries.described(), "measured": entries, "frontier": points, "best_lpa_step": best,
                "kept_lpa_step": kept, "stopped": self.stopped or None}  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = ""
        if not self.entries:
            self._measure(state, control)
            if args.canary_keep_best:  # over what an earlier run may have left by this name
                self.trainer._save_checkpoint(self.trainer.model, None)
        self._decide(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lpa_step, update = divmod(state.global_step, args.defence_steps)
        if update or (lpa_step % args.canary_steps and state.global_step < state.max_steps):
            return
        self._measure(state, control)
        if state.best_global_step == state.global_step and args.canary_keep_best:
            control.should_save = True
        self._decide(control)

    def _measure(self, state: Any, control: Any) -> None:
        trainer, should_log = self.trainer, control.should_log
        found = broadcast_object_list([self.canaries.measure(trainer.model, trainer.pgd)])[0]  # rank 0's
        trainer.leave_out(found["seconds"])
        entry = {"lpa_step": float(trainer.lpa_step), **found}
        trainer.log({f"{selection.PREFIX}{name}": value for name, value in entry.items()})
        control.should_log = should_log  # the LPA step's own numbers follow
        best = selection.best(self.entries, self.limits)
        if best == entry:
            state.best_metric, state.best_global_step = selection.safety(entry), state.global_step
            if trainer.args.canary_keep_best:
                state.best_model_checkpoint = str(trainer.checkpoint_folder(state.global_step))

    def _decide(self, control: Any) -> None:
        self.stopped = selection.stop_reason(self.entries, self.limits)
        if self.stopped:
            control.should_training_stop = True
            self._say("stopped by the canaries after LPA step %d: %s", self.trainer.lpa_step, self.stopped)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model the weights of the best step. A run that was interrupted is to go on with its last ones."""
        if not args.canary_keep_best or self.trainer.interrupted or state.best_global_step == state.global_step:
            return
        self.trainer.accelerator.wait_for_everyone()
        folder = self.trainer.checkpoint_folder(state.best_global_step)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the best step's checkpoint {folder} is gone; the model has the last step's weights"
            )
        state.best_model_checkpoint = str(folder)  # the run's folder may have been moved since
        self.trainer._load_best_model()
        step = int(selection.best(self.entries, self.limits)["lpa_step"])
        self._say("the model has the weights of LPA step %d, the best by its canaries%s", step,
                  "" if step else ": no later step was safer within the limits")  # fmt: skip

    def _say(self, message: str, *values: Any) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(message, *values)
