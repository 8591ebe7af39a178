"""LPATrainer: transformers' Trainer with a latent attack before every few model updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from lpa_kernels.attack import LatentPGD, Objective, PairBatch, adapters_off, forget_graphs
from lpa_kernels.model import frozen_eval

from ..config import BENIGN_TERMS, LPAConfig
from ..evaluation.measure import attack_of
from ..inherited import check_options
from .base_logits import BaseLogits
from .callbacks import CanaryCallback, WholeSteps
from .canaries import Canaries
from .durable import DurableTrainer, StopTraining
from .evaluating import EvalSet, eval_sets, evaluate_sets
from .losses import BenignBatch, reference_gap
from .microbatch import MemoryLimit
from .optimisers import Fresh, check_made, check_optimizers
from .prepare import (
    add_adapters,
    benign_as_tokens,
    check_base,
    check_benign,
    check_model,
    fix_date,
    pairs_as_tokens,
    warn_if_small,
)
from .progress import show_lpa_steps
from .ranks import check_engine, check_same_weights, from_main, reduce_gradients
from .record import text_tokens
from .rehearsal import rehearse_saving
from .resuming import sources
from .sampler import LPABatchSampler
from .step import LPAStep

logger = logging.getLogger(__name__)


class LPATrainer(DurableTrainer):
    """Trains a model to keep its answers while an adversary pushes its hidden states.

    One LPA step takes one global batch: every micro-batch is attacked once (in eval mode, weights frozen), and the
    model is then updated `defence_steps` times, each micro-batch under its own attack in every one of them.
    transformers' loop sees the micro-batches `defence_steps` times over, so callbacks, logging, schedules and
    checkpoints are its own; `global_step` counts model updates, and checkpoints are made at the ends of LPA steps only.

    Logged every LPA step: "attack_toward_first", "_last" and the same for "away", "dpo" and "ipo" (the adversary's
    losses at its first and last inner step), "defence_toward", "_away", "_dpo", "_ipo", "_sft", "_kl", "_total" (the
    last update's losses, the total being their plain sum), "norm/SITE" (mean over attacked tokens),
    "boundary_fraction", "padding_share" (of the attack's passes: places without a token), "seconds_attack", "_defence",
    "_other", "tokens_per_second" (tokens of both texts times the passes made over them), and "lpa_step". With
    `canary_steps`, every so many LPA steps, "canary/" and what `lpa.training.canaries` measures; `canaries` is then the
    `CanaryCallback`, and the weights end as those of the best step.

    With `eval_strategy`, or when `evaluate()` is called, "eval_loss" and the other numbers of `evaluate`.

    Args:
        model: a causal language model, or what `lpa.models.load` takes. Adapters in it are trained on.
        args: settings.
        train_dataset: pairs (columns prompt, rejected, chosen), or anything `lpa.data.load_pairs` takes; by default the
            shipped statements.
        processing_class: the tokenizer.
        eval_dataset: pairs, or a mapping of names to pairs, for `evaluate`; by default the shipped held-out statements.
        peft_config: adapters to train instead of the config's LoRA.
        benign_dataset: prompt and response, for the sft and kl terms; by default the shipped desirable statements.
        ref_model: the base model of the kl, dpo and ipo terms where the trained one has no adapters to switch off.
        data_collator, benign_collator: for data of one's own kind; they give the keys of `PairCollator` and
            `BenignCollator`, and the data sets are then left as they are.
        options: `Trainer`'s own (`lpa.inherited` says which have a meaning here).

    Raises:
        ValueError: no LM head, an unknown site, an empty or malformed data set, a row longer than the context, a
            benign_dataset that no term uses, a kl, dpo or ipo term without a base model, an optimiser that does not
            hold what is trained, or an option of `Trainer` that would have no effect.
        FloatingPointError (from `train`): losses or gradients that are not finite; the weights are then those of the
            last update before, and no checkpoint is written. The other ranks raise `lpa.training.ranks.RankError`.
    """

    args: LPAConfig

    def __init__(
        self,
        model: Any,
        args: LPAConfig | None = None,
        train_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        benign_dataset: Any = None,
        ref_model: Any = None,
        data_collator: Callable[..., Any] | None = None,
        benign_collator: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        args = args or LPAConfig()
        if not isinstance(args, LPAConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; give an LPAConfig, which takes the same settings and LPA's"
            )
        check_options(options, args)
        if type(self).compute_loss is not Trainer.compute_loss:
            raise ValueError(
                f"{type(self).__name__}.compute_loss would never be called: the losses are LPA's; LPAConfig has their "
                "weights (toward_coef, sft_coef, ...)"
            )
        if args.fsdp and args.world_size == 1:
            raise ValueError(
                "fsdp shares the weights among several processes, and this is one; start them with torchrun "
                "--nproc_per_node N -m lpa train ... or accelerate launch, or leave fsdp out"
            )
        if isinstance(model, (str, Path)):
            from ..models import load

            model, tokenizer = load(model)
            processing_class = processing_class or tokenizer
        check_model(model, args)
        benign = any(name in args.coefs for name in BENIGN_TERMS)
        if processing_class is not None and (data_collator is None or (benign and benign_collator is None)):
            fix_date(processing_class, args)
        dataset, collator, self.lengths = pairs_as_tokens(train_dataset, model, processing_class, args, data_collator)
        self.benign: Any = None
        check_benign(args, benign_dataset)
        if benign:
            self.benign, self.benign_collator, self.benign_lengths = benign_as_tokens(
                benign_dataset, model, processing_class, args, benign_collator
            )
        set_seed(args.seed)  # new adapters are random
        model = add_adapters(model, args, peft_config)
        self.objective = args.pair_objective
        refers = self.objective is not None and self.objective.needs_reference
        if ("kl" in args.coefs or refers) and ref_model is None:
            name = "kl" if "kl" in args.coefs else str(self.objective and self.objective.preference)
            check_base(model, args, f"{name}_coef")
        check_optimizers(options.get("optimizers") or (None, None), model)
        eval_dataset, self._eval_collator = options.pop("eval_dataset", None), data_collator
        self._eval_sets: dict[str, EvalSet] | None = None
        if eval_dataset is not None or args.eval_on_start or args.eval_strategy != "no":  # now: it may be malformed
            self._eval_sets = eval_sets(eval_dataset, model, processing_class, args, data_collator)
        if args.n_gpu > 1:
            logger.warning("using one of %d GPUs; start with torchrun or accelerate launch to use all", args.n_gpu)
            args._n_gpu = 1
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=dataset, processing_class=processing_class,
            eval_dataset=self._eval_sets and {name: rows for name, (rows, _) in self._eval_sets.items()},
            **options,
        )  # fmt: skip
        show_lpa_steps(self)
        self._whole = WholeSteps()
        self.add_callback(self._whole)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.get_optimizer_cls_and_kwargs(args, self.model)  # now: it raises where a package is missing
        self.ref_model = None if ref_model is None else ref_model.to(args.device).eval()
        self._sources = sources(self)  # now, as training may share the weights out among ranks
        warn_if_small(len(dataset), self.batch_size)
        check_engine(self)
        self._pgd: LatentPGD | None = attack_of(self.model, args, processing_class)  # now: it raises for unknown sites
        self._step: LPAStep | None = None  # while one is begun and not ended
        self._memory = MemoryLimit(
            self.accelerator, args.per_device_train_batch_size, args.why_not_split,
            awaited=self.is_fsdp_enabled and args.world_size > 1,
        )  # fmt: skip
        self._index = 0  # of the next micro-batch of an update
        self._metrics: dict[str, float] = {}  # of the LPA step that has just ended
        self._fresh: Fresh | None = None
        self._compared = False  # the ranks' weights, after the first update
        self.canaries: CanaryCallback | None = None
        if args.canary_steps:
            self.canaries = CanaryCallback(self, self._canaries())
            self.add_callback(self.canaries)

    # ---- data ------------------------------------------------------------------------------------------------------

    def _canaries(self) -> Canaries:
        if self.processing_class is None:
            raise ValueError(f"canary_steps={self.args.canary_steps} needs processing_class, a tokenizer to ask with")
        names = {"rejected", "chosen"} & set(getattr(self.train_dataset, "column_names", ()))
        return Canaries(self.processing_class, self.args, [text for name in names for text in self.train_dataset[name]])

    def leave_out(self, seconds: float) -> None:
        """Subtract seconds spent on something else from the LPA step's time."""
        if self._step is not None:
            self._step.record.start += seconds

    @property
    def batch_size(self) -> int:
        """Pairs an LPA step takes, over all ranks."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _sampler(self, lengths: list[int], seed: int) -> LPABatchSampler:
        args = self.args
        return LPABatchSampler(
            lengths,
            micro_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            repeats=args.defence_steps,
            lpa_steps=args.lpa_steps,
            seed=seed,
            rank=args.process_index,
            world=args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, each LPA step's `defence_steps` times over."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.benign is not None:
            self._benign_sampler = self._sampler(self.benign_lengths, seed + 1)
        workers: dict[str, Any] = {}
        if self.args.dataloader_num_workers:
            workers = {
                "num_workers": self.args.dataloader_num_workers,
                "persistent_workers": self.args.dataloader_persistent_workers,
                "prefetch_factor": self.args.dataloader_prefetch_factor,
                "multiprocessing_context": self.args.dataloader_multiprocessing_context,
                "in_order": self.args.dataloader_in_order,
            }
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler(self.lengths, seed),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            **workers,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro-batches of one update; those of a new LPA step are taken over and counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._index = 0
        if self.next_update == 0:
            self._begin_lpa_step(batches)
        elif self._step is None:
            raise ValueError(
                f"the checkpoint is of model update {self.state.global_step}, which ends no LPA step of "
                f"defence_steps={self.args.defence_steps}; resume with the defence_steps it was made with"
            )
        return batches, None

    @property
    def next_update(self) -> int:
        """Which update of the LPA step is next, from 0."""
        return self.state.global_step % self.args.defence_steps

    @property
    def lpa_step(self) -> int:
        """LPA steps that are done."""
        return self.state.global_step // self.args.defence_steps

    # ---- one LPA step ----------------------------------------------------------------------------------------------

    def _begin_lpa_step(self, batches: list[Any]) -> None:
        self.agree()
        if self.control.should_training_stop:  # by a callback, before the first step
            raise StopTraining
        if self.args.reset_optimizer and self._fresh is not None:
            self._fresh.restore(self.optimizer)  # at the step's end too, but saving shards makes a state of zeros
        pairs = [PairBatch.from_dict(batch) for batch in batches]
        benign: list[BenignBatch | None] = [None] * len(pairs)
        if self.benign is not None:
            rows = self._benign_sampler.micro_batches(self.lpa_step)
            benign = [
                BenignBatch.from_dict(self.benign_collator([self.benign[i] for i in each]), rows=each) for each in rows
            ]
        self._step = LPAStep(self, pairs, benign, self._memory.size)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of one update, forward and backward under its attack; before the first, all are attacked.

        Where memory runs out on any rank, every rank runs this and all later micro-batches in halves. The update then
        starts again from its first micro-batch, because a failed backward pass leaves partial gradients. Ranks meet
        after each phase. Within a phase they wait for each other only under FSDP2, for weights.
        """
        assert self._step is not None
        first, self._index = self._index, self._index + 1
        while (losses := self._attempt(self._step, first)) is None:
            first = 0
            model.zero_grad(set_to_none=True)
            forget_graphs(self.model)
            clear_device_cache(garbage_collection=True)
            self._step.split(self._memory.size)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if self._index == len(self._step.micro):
            reduce_gradients(model, self.model)
        return losses[-1]

    def _attempt(self, step: LPAStep, first: int) -> list[Tensor] | None:
        """Attack and add up gradients, from micro-batch `first` on; None where memory ran out on some rank."""
        micro = step.micro[first : self._index]
        if self.next_update == 0 and first == 0:  # all of them, so that the model becomes what attacks need once
            if self._memory.attempt("attack", step.ask, step.micro) is None:
                return None
            with step.held():
                for parts in step.micro:
                    if self._memory.attempt("attack", step.attack, [parts]) is None:
                        return None
                    self.agree()
        return self._memory.attempt("update", step.update, micro)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the base class; `reset_optimizer` gives each LPA step the optimiser as it is made here.

        Raises:
            ValueError: the optimiser keeps other weights for evaluation than for training.
        """
        made = super().create_optimizer(model)
        check_made(made)
        if self._fresh is None:  # before a checkpoint's state is loaded into it
            self._fresh = Fresh(made)
        return made

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens of both completions' texts, as the base class does those of one text."""
        how = self.args.include_num_input_tokens_seen
        if how == "no":
            return
        kinds = ("rejected", "chosen")
        if how == "all":
            count = sum(inputs[f"{kind}_ids"].numel() for kind in kinds)
        else:
            count = sum(text_tokens(inputs[f"{kind}_mask"].bool()) for kind in kinds)
        found = self.accelerator.gather(torch.tensor([count], device=self.args.device))
        self.state.num_input_tokens_seen += int(found.sum())

    @property
    def pgd(self) -> LatentPGD:
        """The attack, on the model as it is wrapped now."""
        if self._pgd is None or self._pgd.model is not self.model:
            self._pgd = attack_of(self.model, self.args, self.processing_class)
        return self._pgd

    @contextmanager
    def base_model(self) -> Iterator[Any]:
        """The model before training: the reference model, or the trained one with its adapters off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        with frozen_eval(self.model), adapters_off(self.model):
            yield self.model

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not bool(torch.as_tensor(norm).isfinite()):
            raise FloatingPointError(
                f"LPA step {self.lpa_step + 1}, update {self.next_update + 1}: the gradient's norm is {float(norm)}; "
                "the weights are those before it. Look for NaN in the model's weights, lower learning_rate, or load "
                "the model in bfloat16 or float32 instead of float16"
            )
        return norm

    def _end_lpa_step(self) -> None:
        """Gather what is logged, and let go of the attacks and the optimiser's state."""
        if self._step is None:
            return
        self._metrics = self._step.record.metrics(self.accelerator, self.lpa_step)
        self._step = None
        if self.args.reset_optimizer and self._fresh is not None:
            self._fresh.restore(self.optimizer)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure pairs with the present weights, clean and under the run's attack.

        Args:
            eval_dataset: pairs, or a mapping of names to pairs; by default those that the trainer was given, else the
                shipped held-out statements. The name of shipped ones ("both", ...) means held-out ones.
            metric_key_prefix: of the numbers' names; a set's name follows it.

        Returns:
            with "eval_" before their names: "loss", what the defence minimises of pairs, under the attack, and its
            terms; "preferred", the share of pairs whose chosen completion is likelier; "margin", their mean log-odds in
            nats; both with "_attacked" too; "runtime" in seconds.

        Raises:
            ValueError: the pairs are empty, malformed or too long.
        """
        sets = self._eval_sets
        if eval_dataset is not None or sets is None:
            sets = eval_sets(eval_dataset, self.model, self.processing_class, self.args, self._eval_collator)
            if eval_dataset is None:
                self._eval_sets = sets
        metrics = evaluate_sets(self, sets, metric_key_prefix)
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **options: Any) -> Any:
        """Raises ValueError: a pair has no labels to predict."""
        raise ValueError("LPATrainer has no predict(): a pair has no labels; use evaluate(pairs), or lpa evaluate")

    def reference(self, batch: PairBatch, objective: Objective) -> Tensor | None:
        """[B] log-probability gaps of the base model, for an objective that needs them."""
        if not objective.needs_reference:
            return None
        with torch.no_grad(), self.base_model() as base:
            return reference_gap(self.pgd, base, batch, objective)

    # ---- the loop's joints -----------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, with saving and stopping put off to the end of the LPA step."""
        if not self._compared and self.args.world_size > 1 and not self.is_fsdp_enabled:
            check_same_weights(self.accelerator, self.model)
            self._compared = True
        if self.next_update:
            self._whole.put_off(self.control)
        else:
            self._whole.ask_again(self.control)
            self._end_lpa_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As the base class; `WholeSteps` stays last, after the callbacks that ask for stops."""
        super().add_callback(callback)
        self.callback_handler.callbacks.sort(key=lambda each: isinstance(each, WholeSteps))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the base class, with the LPA step's numbers added to those of the update that ends it."""
        if "loss" in logs:
            logs.update(self._metrics)
            self._metrics = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers' estimate is for one pass over one text, which is not what happens here."""
        return 0

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """As the base class. A stop takes effect after the running attack, or after the last update of the LPA step."""
        self._compared, self._step = False, None
        self.base_logits = BaseLogits.for_run(self)
        from_main(self.accelerator, lambda: rehearse_saving(self))
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._step = None

    def kept_settings(self) -> dict[str, Any]:
        """Settings and sources that a checkpoint keeps; a resumed run must have the same."""
        return self.args.bound_settings | {"pairs an LPA step": self.batch_size} | self._sources

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """At the end of an LPA step alone: within one, its attacks would have to be saved too."""
        if self.next_update:
            self._whole.save = True
            return
        super()._save_checkpoint(model, trial)
