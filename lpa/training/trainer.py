"""LPATrainer: transformers' Trainer with a latent attack before every few model updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput

from lpa_kernels.attack import LatentPGD, Objective, PairBatch, adapters_off, forget_graphs
from lpa_kernels.model import frozen_eval

from ..config import BENIGN_TERMS, LPAConfig
from ..evaluation.measure import attack_of
from ..inherited import check_options
from .callbacks import CanaryCallback, WholeSteps
from .canaries import Canaries
from .card import data_hash, weights_hash
from .durable import DurableTrainer, StopTraining
from .evaluating import PAIR_COLUMNS, EvalSet, eval_sets, evaluate_pairs
from .losses import BenignBatch, benign_terms, pair_terms, reference_gap
from .microbatch import MemoryLimit, MicroBatch, free_memory
from .optimisers import Fresh, check_made, check_optimizers
from .prepare import add_adapters, benign_as_tokens, check_model, pairs_as_tokens, warn_if_small
from .progress import LPAProgress
from .ranks import check_engine, check_same_weights, from_main, reduce_gradients
from .record import StepRecord, text_tokens
from .rehearsal import rehearse_saving
from .sampler import LPABatchSampler

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

    With `eval_strategy`, or when `evaluate()` is called, "eval_loss" and what else `evaluate` tells of pairs.

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
            last update before, and no checkpoint is written. On ranks that it did not happen to it is a
            `lpa.training.ranks.RankError`.
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
        check_options(options)
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
        dataset, collator, self.lengths = pairs_as_tokens(train_dataset, model, processing_class, args, data_collator)
        self.benign: Any = None
        if benign_dataset is not None and not any(name in args.coefs for name in BENIGN_TERMS):
            raise ValueError("the benign data set is not used: sft_coef and kl_coef are 0; give one of them a weight")
        if any(name in args.coefs for name in BENIGN_TERMS):
            self.benign, self.benign_collator, self.benign_lengths = benign_as_tokens(
                benign_dataset, model, processing_class, args, benign_collator
            )
        set_seed(args.seed)  # new adapters are random
        model = add_adapters(model, args, peft_config)
        self.objective = args.pair_objective
        self._refers = self.objective is not None and self.objective.needs_reference
        if ("kl" in args.coefs or self._refers) and ref_model is None and not hasattr(model, "disable_adapter"):
            name = "kl" if "kl" in args.coefs else self.objective and self.objective.preference
            raise ValueError(
                f"{name}_coef={getattr(args, f'{name}_coef')} needs the base model, and without adapters there is "
                f"none; give ref_model, train adapters, or set {name}_coef to 0"
            )
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
        shown = PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
        # the last of its kind is the one that `Trainer` has added; others are the user's
        added = next((c for c in reversed(self.callback_handler.callbacks) if type(c) is shown), None)
        if added is not None:
            self.callback_handler.callbacks.remove(added)
        if not args.disable_tqdm:
            self.add_callback(LPAProgress())
        self.add_callback(WholeSteps(self))
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.get_optimizer_cls_and_kwargs(args, self.model)  # now, for what it says of packages that are missing
        self.ref_model = None if ref_model is None else ref_model.to(args.device).eval()
        # now, as training may share the weights out among ranks
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        self._base_hash = weights_hash([*frozen, *(() if ref_model is None else ref_model.parameters())])
        warn_if_small(len(dataset), self.batch_size)
        check_engine(self)
        # now, for what it says of unknown sites
        self._pgd: LatentPGD | None = attack_of(self.model, args, processing_class)
        self._micro: list[list[MicroBatch]] = []  # each in parts, one where memory is enough
        self._memory = MemoryLimit(
            self.accelerator, args.per_device_train_batch_size, args.why_not_split,
            awaited=self.is_fsdp_enabled and args.world_size > 1,
        )  # fmt: skip
        self._index = 0
        self._counts = (0.0, 0.0, 0.0)
        self._record: StepRecord | None = None
        self._metrics: dict[str, float] = {}
        self._save_later = self._stop_later = self._evaluate_later = False
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
        if self._record is not None:
            self._record.start += seconds

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
        if self._update == 0:
            self._begin_lpa_step(batches)
        elif not self._micro:
            raise ValueError(
                f"the checkpoint is of model update {self.state.global_step}, which ends no LPA step of "
                f"defence_steps={self.args.defence_steps}; resume with the defence_steps it was made with"
            )
        return batches, None

    @property
    def _update(self) -> int:
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
        device = self.args.device
        pairs = [PairBatch.from_dict(batch) for batch in batches]
        benign: list[BenignBatch | None] = [None] * len(pairs)
        if self.benign is not None:
            rows = self._benign_sampler.micro_batches(self.lpa_step)
            benign = [BenignBatch.from_dict(self.benign_collator([self.benign[i] for i in each])) for each in rows]
        own = [(*p.counts, 0 if b is None else b.count, int(p.attack_mask.sum()))
               for p, b in zip(pairs, benign, strict=True)]  # fmt: skip
        *counts, attacked = self.accelerator.reduce(torch.tensor(own, device=device).sum(0)).tolist()
        self._counts = (counts[0], counts[1], counts[2])
        if self.objective is not None and self.args.attack_steps:
            self.pgd.check_counts(counts[0], counts[1], attacked)
        self._record = StepRecord(self.args, pairs, benign, device)
        whole = [
            MicroBatch.of(
                p.to(device), None if b is None else BenignBatch(b.ids.to(device), b.mask.to(device)),
                (index * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size,
            )
            for index, (p, b) in enumerate(zip(pairs, benign, strict=True))
        ]  # fmt: skip
        self._micro = [micro.split(self._memory.size) for micro in whole]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of one update: attacked first where it is new, then forward and backward under its attack.

        Where memory runs out on any rank, every rank runs this and all later micro-batches in halves. The update then
        starts again from its first micro-batch, because a failed backward pass leaves partial gradients. Ranks meet
        after each phase. Within a phase they wait for each other only under FSDP2, for weights.
        """
        first, self._index = self._index, self._index + 1
        while (losses := self._attempt(first)) is None:
            first = 0
            self._make_room(model)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if self._index == len(self._micro):
            reduce_gradients(model, self.model)
        return losses[-1]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the base class; `reset_optimizer` gives each LPA step the optimiser as it is made here.

        Raises:
            ValueError: it keeps other weights for evaluation than for training.
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

    def _attempt(self, first: int) -> list[Tensor] | None:
        """Attack and add up gradients, from micro-batch `first` on; None where memory ran out on some rank."""
        micro = self._micro[first : self._index]
        if self._update == 0:
            if self._memory.attempt("attack", self._attack_parts, micro) is None:
                return None
            self.agree()
        return self._memory.attempt("update", self._update_parts, micro)

    def _make_room(self, model: nn.Module) -> None:
        assert self._record is not None
        self._record.forget_defence()
        model.zero_grad(set_to_none=True)
        forget_graphs(self.model)
        free_memory()
        self._micro = [[part for micro in parts for part in micro.split(self._memory.size)] for parts in self._micro]

    def _attack_parts(self, parts: Sequence[MicroBatch]) -> None:
        assert self._record is not None
        for part in parts:
            if not part.attacked:
                with self._record.timed("attack"):
                    self._attack(part)

    def _update_parts(self, parts: Sequence[MicroBatch]) -> Tensor:
        """Add the gradients of a micro-batch. Returns its loss."""
        assert self._record is not None
        self.model.train()
        losses = []
        for part in parts:
            with self._record.timed("defence"):
                torch.manual_seed(self._seed(part, self._update + 1))
                total, terms = self._losses(part)
                # DDP averages the ranks' gradients, and the loss is a sum over all of them
                total = total * self.args.world_size
                self.accelerator.backward(total)
            self._record.add_defence(self._update, terms)
            losses.append(total.detach())
        return torch.stack(losses).sum()

    def _seed(self, micro: MicroBatch, draw: int) -> int:
        """All that is random in an LPA step follows from its number, so that a resumed run is the same run, and from
        a pair's place in it, so that one in smaller parts is too."""
        seed = self.args.seed * 1_000_003 + self.lpa_step
        return int((seed * 65_537 + micro.first) * 257 + draw) % 2**63

    @property
    def pgd(self) -> LatentPGD:
        """The attack, on the model as it is wrapped now."""
        if self._pgd is None or self._pgd.model is not self.model:
            self._pgd = attack_of(self.model, self.args, self.processing_class)
        return self._pgd

    def _attack(self, micro: MicroBatch) -> None:
        self._ask_base_model(micro)  # first: where an attack fails, its passes are the last that other ranks wait for
        seed = self._seed(micro, 0)
        torch.manual_seed(seed)
        radius = self.args.attack_radius(self.lpa_step)
        if self.objective is not None and radius:
            whole = radius == self.args.attack_epsilon
            pgd = self.pgd if whole else attack_of(self.model, self.args, self.processing_class, epsilon=radius)
            generator = torch.Generator().manual_seed(seed) if self.args.attack_random_start else None
            try:
                counts = self._normalisers(micro)[:2]
                micro.attack = pgd.attack(micro.pairs, counts, part=True, generator=generator)
            except FloatingPointError as error:
                raise FloatingPointError(f"LPA step {self.lpa_step + 1}: {error}") from error
        if micro.attack is not None:
            assert self._record is not None
            self._record.add_attack(micro.attack, micro.share)
        if self.args.offload_attacks:
            micro.to_host()
        micro.attacked = True

    def _ask_base_model(self, micro: MicroBatch) -> None:
        kl = micro.benign is not None and "kl" in self.args.coefs
        if not kl and not self._refers:
            return
        with torch.no_grad(), self._base_model() as base:
            if kl and micro.benign is not None:
                micro.base = micro.benign.logits(base, at=self.args.kl == "public")
            if self._refers and self.objective is not None:
                micro.reference = reference_gap(self.pgd, base, micro.pairs, self.objective)

    @contextmanager
    def _base_model(self) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        with frozen_eval(self.model), adapters_off(self.model):
            yield self.model

    def _normalisers(self, micro: MicroBatch) -> tuple[float, float, float]:
        """Tokens that the means over rejected, chosen and benign completions divide by."""
        if self.args.normaliser == "global":
            return self._counts
        return micro.counts

    def _losses(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch, and its terms by name."""
        rejected, chosen, answers = self._normalisers(micro)
        total: Any = 0.0
        terms: dict[str, Tensor] = {}
        if self.objective is not None:
            counts = (rejected, chosen)
            total, terms = pair_terms(self.pgd, micro.pairs, micro.attack, self.objective, counts, micro.reference)
            if self.objective.preference:  # it is a mean over these pairs
                whole = self.batch_size if self.args.normaliser == "global" else micro.size
                total = total * (len(micro.pairs) / whole)
                terms = {name: value * micro.share for name, value in terms.items()}
        if micro.benign is not None:
            own = {name: value for name, value in self.args.coefs.items() if name in BENIGN_TERMS}
            base = None if micro.base is None else micro.base.to(micro.benign.ids.device)
            part, more = benign_terms(self.model, micro.benign, own, answers, self.args.kl, base)
            total, terms = total + part, terms | more
        return total, terms

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not bool(torch.as_tensor(norm).isfinite()):
            raise FloatingPointError(
                f"LPA step {self.lpa_step + 1}, update {self._update + 1}: the gradient's norm is {float(norm)}; the "
                "weights are those before it. Look for NaN in the model's weights, lower learning_rate, or load the "
                "model in bfloat16 or float32 instead of float16"
            )
        return norm

    def _end_lpa_step(self) -> None:
        """Gather what is logged, and let go of the attacks and the optimiser's state."""
        if self._record is None:
            return
        self._metrics = self._record.metrics(self.accelerator, self.lpa_step)
        self._record, self._micro = None, []
        if self.args.reset_optimizer and self._fresh is not None:
            self._fresh.restore(self.optimizer)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What the model says of pairs now, clean and under the run's attack.

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
        metrics: dict[str, float] = {}
        for name, (rows, collator) in sets.items():
            begin, prefix = time.perf_counter(), f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            found = evaluate_pairs(self, rows, collator) | {"runtime": time.perf_counter() - begin}
            self.leave_out(found["runtime"])
            metrics |= {f"{prefix}_{key}": value for key, value in found.items()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **options: Any) -> Any:
        """Not there: a pair has no labels to predict."""
        raise ValueError("LPATrainer has no predict(): a pair has no labels; use evaluate(pairs), or lpa evaluate")

    def reference(self, batch: PairBatch, objective: Objective) -> Tensor | None:
        """[B] log-probability gaps of the base model, for an objective that needs them."""
        if not objective.needs_reference:
            return None
        with torch.no_grad(), self._base_model() as base:
            return reference_gap(self.pgd, base, batch, objective)

    # ---- the loop's joints -----------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, with saving and stopping put off to the end of the LPA step."""
        if not self._compared and self.args.world_size > 1 and not self.is_fsdp_enabled:
            check_same_weights(self.accelerator, self.model)
            self._compared = True
        if self._update:
            self.put_off(self.control)
            self._save_later |= self.control.should_save
            self._evaluate_later |= self.control.should_evaluate
            self.control.should_save = self.control.should_evaluate = False
        else:
            self.control.should_save |= self._save_later
            self.control.should_evaluate |= self._evaluate_later
            self.control.should_training_stop |= self._stop_later
            self._save_later = self._stop_later = self._evaluate_later = False
            self._end_lpa_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def put_off(self, control: Any) -> None:
        """Let a stop that a callback asks for within an LPA step wait for its end."""
        self._stop_later |= control.should_training_stop or control.should_epoch_stop
        control.should_training_stop = control.should_epoch_stop = False

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As the base class; what puts stops off stays behind those that ask for them."""
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
        """As the base class. A stop leaves an attack at its end, and updates where the LPA step's last one is made."""
        self._save_later = self._stop_later = self._evaluate_later = self._compared = False
        self._record, self._micro = None, []
        from_main(self.accelerator, lambda: rehearse_saving(self))
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._record, self._micro = None, []

    def kept_settings(self) -> dict[str, Any]:
        """What a checkpoint keeps, since a resumed run must have the same."""
        return self.args.bound_settings | {
            "pairs an LPA step": self.batch_size,
            "rows": len(self.lengths),
            "data": self._data_hash,
            "benign rows": None if self.benign is None else len(self.benign),
            "benign data": self._benign_hash,
            "base model": self._base_hash,
        }

    @cached_property
    def _data_hash(self) -> str | None:
        return _hash_of(self.train_dataset, sorted(PAIR_COLUMNS))

    @cached_property
    def _benign_hash(self) -> str | None:
        return _hash_of(self.benign, ["prompt", "response"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Only at the ends of LPA steps, where nothing of a begun step has to be kept."""
        if self._update:
            self._save_later = True
            return
        super()._save_checkpoint(model, trial)


def _hash_of(dataset: Any, columns: list[str]) -> str | None:
    """SHA-256 of a data set's texts; None where it has not these columns, as one with a collator of its own."""
    if not set(columns) <= set(getattr(dataset, "column_names", ())):
        return None
    return data_hash(dataset.select_columns(columns), tuple(columns))
