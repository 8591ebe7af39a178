"""Run an attack and a model update on the meta device, with the code that a run uses, and note memory and work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

from lpa_kernels.attack import AttackResult, Layout, PairBatch, adapters_off, layout_logits, loop, unshared
from lpa_kernels.attack.loop import HookedForward, InnerStep
from lpa_kernels.attack.passes import layout_rows
from lpa_kernels.attack.state import AttackState
from lpa_kernels.model import decoder_layers, in_block, modes
from lpa_kernels.model.modes import inner_mode
from lpa_kernels.model.perturbation import fixed_rows, kept_for_recompute

from ..config import BENIGN_TERMS, LPAConfig
from ..evaluation.measure import attack_of
from ..training.losses import benign_terms, pair_terms
from ..training.prepare import add_adapters
from .ledger import Ledger
from .shapes import PlanShape, build, laid_out, quantize, to_meta
from .sharding import Shards, shared

# "copies": weights saved from merging, and adapters in the weights' dtype, for the inner loop. Of several ranks alone:
# "buckets", in which DDP adds up gradients, and "gathered", what FSDP2 has whole at a time.
PARTS = ("weights", "adapters", "copies", "gradients", "buckets", "optimiser", "gathered", "perturbations", "logits",
         "activations")  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What one rank's run is expected to take.

    Attributes:
        phases: phase -> part -> bytes at that phase's highest moment.
        attack_flops, defence_flops: of the whole run, all ranks together.
        trained, total: weights. rows, tokens: of a micro-batch's pass.
    """

    phases: dict[str, Counter[str]]
    attack_flops: float
    defence_flops: float
    trained: int
    total: int
    rows: int
    tokens: int

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total())

    @property
    def peak(self) -> Counter[str]:
        """Bytes by part at the highest moment of the run."""
        return self.phases[self.peak_phase]


def estimate(
    config: Any,
    args: LPAConfig,
    shape: PlanShape | None = None,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantized: str | None = None,
    trust_remote_code: bool = False,
    ranks: int = 1,
) -> Estimate:
    """Memory of one rank and floating-point work of a run.

    Args:
        config: a configuration of transformers.
        args: the run's settings.
        shape: of its rows.
        dtype: of the weights; by default the configuration's.
        quantized: one of `FOUR_BIT`, `FOUR_BIT_NESTED`, `EIGHT_BIT`, or None.
        ranks: that run it, by DDP or, with `args.fsdp`, FSDP2.

    Raises:
        ValueError: a setting that the plan does not know.
    """
    if args.attack_engine == "reference":
        raise ValueError("attack_engine='reference' keeps the logits of every token and is not planned; plan 'packed'")
    if quantized and not args.lora:
        raise ValueError(f"lora=False trains all weights, and {quantized} ones cannot be trained")
    if args.kl == "public" and "kl" in args.coefs:
        raise ValueError("kl='public' is not planned; plan 'standard'")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"optim={optim!r} is not planned; plan adamw_torch")
    if ranks < 1 or (args.fsdp and ranks == 1):
        raise ValueError(f"ranks={ranks} must be at least {2 if args.fsdp else 1}{' with fsdp' if args.fsdp else ''}")
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    model = build(config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    if quantized:
        quantize(model, quantized)
    with torch.device("meta"):
        model = add_adapters(model, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    return _DryRun(model, args, shape or PlanShape(), ranks).estimate(total)


class _DryRun:
    def __init__(self, model: Any, args: LPAConfig, shape: PlanShape, ranks: int) -> None:
        self.model, self.args, self.shape, self.ranks = model, args, shape, ranks
        self.sharers = ranks if args.fsdp else 1  # of a weight
        self.size, self.micro = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.packed = (model.config._attn_implementation or "sdpa") in ("eager", "sdpa")
        self.batch = shape.pairs(self.size, args.attack_on)
        self.layout = laid_out(self.batch, self.packed)
        self.meta = to_meta(self.layout)
        self.pgd = attack_of(model, args, backend="reference")
        # what losses.pair_terms asks of an attack's object
        self.rows_of = SimpleNamespace(
            settings=self.pgd.settings,
            rows=self._rows,
        )
        self.ledger = Ledger(model.get_output_embeddings().weight.shape[0])
        self.flops: dict[str, float] = {"attack": 0.0, "defence": 0.0}

    def estimate(self, total: int) -> Estimate:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = {id(p) for p in trained}
        others = [p for p in self.model.parameters() if id(p) not in own]
        with self.ledger.kind("weights"):
            self.ledger.add((*self.model.buffers(), *(p for p in others if not shared(p))))
        with self.ledger.kind("weights", self.sharers):
            self.ledger.add(others)
        with self.ledger.kind("adapters" if self.args.lora else "weights", self.sharers):
            self.ledger.add(trained)
        shards = Shards(self.model, self.ledger, self.ranks) if self.args.fsdp else None
        self.settle = shards.settle if shards else lambda: None
        phases: dict[str, Counter[str]] = {"weights": self.ledger.kinds.copy()}
        with _on_meta(), self.ledger:
            buckets = self._buckets(trained)
            # the last micro-batch of an LPA step: the others have their perturbations and gradients
            kept = self._of_other_micro_batches(trained)
            moments = [] if self.args.reset_optimizer else self._moments(trained)
            deltas = []
            if self.args.attack_steps:
                deltas.append(self._attack())
                phases["attack"] = self.ledger.peak
            moments = moments or self._moments(trained)
            phases["defence"] = self._defence(deltas)
            del kept, moments, buckets
        args = self.args
        passes = args.lpa_steps * self.micro * self.ranks
        rows, length = self.layout.shape
        return Estimate(
            phases,
            self.flops["attack"] * passes * args.attack_steps,
            self.flops["defence"] * passes * args.defence_steps,
            sum(p.numel() for p in trained),
            total,
            rows,
            rows * length,
        )

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        """Add the work within to a phase."""
        before = self.ledger.flops
        yield
        self.flops[phase] += self.ledger.flops - before

    def _attack(self) -> AttackResult:
        """One inner step, with all that stays over the steps; returns the perturbations."""
        self.ledger.mark()
        with ExitStack() as stack:
            sharded = _exchanged(modes, "is_sharded", lambda model: bool(self.args.fsdp))
            with self.ledger.kind("copies", self.sharers), sharded:
                stack.enter_context(inner_mode(self.model, self.args.attack_merge_adapters))
            with self.ledger.kind("perturbations"):
                state = to_meta(AttackState(self.pgd.settings, self.pgd.widths(), self.batch, (1.0, 1.0)))
            head = self.model.get_output_embeddings()
            large = self.layout.labels.shape[0] * head.weight.shape[0] >= loop.CHUNK_FROM
            chunked = large and type(head) is nn.Linear and not self.args.fsdp
            forward = HookedForward(self.model, self.pgd.sites, self.meta, "reference", *self._trimmed())
            step = InnerStep(self.model, self.pgd.settings, state, self.meta, forward, chunked)
            step.prepare()
            with self._counted("attack"):
                step()
            self.settle()
            return AttackResult(
                self.pgd.sites, state.deltas, state.grid, 1.0, {}, state.grid, state.grid, "packed", batch=self.batch,
                backend="reference",
            )  # fmt: skip

    def _rows(self, batch: PairBatch, attack: AttackResult | None) -> Any:
        if attack is None:
            return layout_rows(self.model, self.meta)
        with kept_for_recompute(self.model, lambda: attack.perturbing(fixed_rows(self.meta.token_rows))):
            return layout_rows(self.model, self.meta)

    def _trimmed(self) -> tuple[nn.Module | None, Tensor | None]:
        """As `HookedForward.trim`, of which only the question whether it may is left out."""
        try:
            layers = decoder_layers(self.model)
            module = in_block(layers[-1], len(layers) - 1, "mlp")
        except ValueError:
            return None, None
        if any(site.module in set(module.modules()) for site in self.pgd.sites):
            return None, None
        return module, self.layout.scored_tokens.to("meta")

    def _of_other_micro_batches(self, trained: list[nn.Parameter]) -> list[Tensor]:
        """Their perturbations; the gradients are put where they belong, whole: FSDP2 scatters the last one's alone."""
        if self.micro > 1:
            with self.ledger.kind("gradients"):
                for p in trained:
                    p.grad = torch.empty_like(p)
        if self.args.offload_attacks or not self.args.attack_steps:
            return []
        rows = int(self.batch.attack_mask.sum())
        with self.ledger.kind("perturbations"):
            return [torch.empty(rows, width, device="meta") for _ in range(self.micro - 1)
                    for width, _ in self.pgd.widths()]  # fmt: skip

    def _buckets(self, trained: list[nn.Parameter]) -> list[Tensor]:
        if self.ranks == 1 or self.args.fsdp:
            return []
        with self.ledger.kind("buckets"):
            return [torch.empty_like(p) for p in trained]

    def _moments(self, trained: list[nn.Parameter]) -> list[Tensor]:
        with self.ledger.kind("optimiser", self.sharers):
            return [torch.empty_like(p) for p in trained for _ in range(2)]

    def _defence(self, attacks: list[AttackResult]) -> Counter[str]:
        """One micro-batch of an update that is not the first."""
        args, model = self.args, self.model
        benign = [name for name in BENIGN_TERMS if name in args.coefs]
        base: list[Tensor] = []
        rows = self._benign() if benign else None
        if "kl" in benign and rows is not None:
            with torch.no_grad(), ExitStack() as stack:
                if args.lora:
                    stack.enter_context(adapters_off(model))
                first = rows.logits(model)
            base = [first, *(torch.empty_like(first) for _ in range(0 if args.offload_attacks else self.micro - 1))]
            del first
        model.train()
        self.ledger.mark()
        with self._counted("defence"):
            total: Any = 0.0
            if (objective := args.pair_objective) is not None:
                reference = torch.zeros(self.size, device="meta") if objective.needs_reference else None
                attack = attacks[0] if attacks else None
                total, _ = pair_terms(self.rows_of, self.batch, attack, objective, (1.0, 1.0), reference)  # type: ignore[arg-type]
            if rows is not None:
                coefs = {name: args.coefs[name] for name in benign}
                part, _ = benign_terms(model, rows, coefs, 1.0, "standard", base[0] if base else None)
                total = total + part
            total.backward()
            self.settle()
        return self.ledger.peak

    def _benign(self) -> Any:
        """Benign rows on the meta device, with what `losses.benign_terms` asks of them."""
        ids, mask = self.shape.benign(self.size)
        nothing = torch.zeros_like(mask)
        layout: Layout = to_meta(unshared(PairBatch(ids, nothing, ids, mask, nothing)))
        return SimpleNamespace(
            ids=layout.input_ids,
            labels=layout.labels,
            logits=lambda model, at=False: layout_logits(model, layout),
        )


@contextmanager
def _exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, the attribute `name` of a module is `value`."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Within it, models run on the meta device as on a real one: sdpa as one fused op, and no look at values."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes a float mask of it, for every layer
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        heads = query.shape[1] // key.shape[1]
        if heads > 1:
            key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out

    with (
        _exchanged(F, "scaled_dot_product_attention", attend),
        # it looks for packed rows in the values of position ids, and these have none
        _exchanged(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None),
    ):
        yield
