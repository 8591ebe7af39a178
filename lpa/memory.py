"""What a run will need, in closed forms: memory by part and floating-point work.

Sizes follow from the weights (a model on PyTorch's meta device, without memory), from the settings, from the lengths of
the rows and from what autograd keeps of each decoder block, which `Block` states term by term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lpa_kernels.model import Site, decoder_layers, in_block, resolve_sites

from .config import BENIGN_TERMS, LPAConfig, default_sites
from .training.prepare import add_adapters

FOUR_BIT, FOUR_BIT_NESTED, EIGHT_BIT = "4-bit", "4-bit nested", "8-bit"
# "copies": weights saved from merging, and adapters in the weights' dtype, for the inner loop. Of several ranks alone:
# "buckets", in which DDP adds up gradients, and "gathered", what FSDP2 has whole at a time.
PARTS = ("weights", "adapters", "copies", "gradients", "buckets", "optimiser", "gathered", "perturbations", "logits",
         "activations")  # fmt: skip
F32 = 4  # bytes
MOMENTS = {"adamw": 2, "adam": 2, "rmsprop": 1}  # of an update rule, each as large as delta
CHUNK_FROM, CHUNK = 1 << 27, 1 << 25  # logits from which an attack's head is run in chunks, and logits of a chunk


@dataclass(frozen=True)
class PlanShape:
    """How long the rows are, in tokens: prompts with their template, both completions, benign prompts and answers.

    Raises:
        ValueError: a length is below 1.
    """

    prompt: int = 64
    completion: int = 8
    benign_prompt: int = 64
    benign_answer: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name}={value} tokens must be at least 1")


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


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass: `rows` of `length` tokens under a mask or plainly causal, of which the rows `scored`
    have logits that are kept, and `headed` ones reach the head; or that many in `parts` passes, one after the other."""

    rows: int
    length: int
    scored: int
    headed: int
    masked: bool = False
    parts: int = 1

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return self.rows * self.length

    @property
    def unscored(self) -> int:
        """Tokens whose prediction is not scored."""
        return max(self.tokens - self.scored, 0)


@dataclass(frozen=True)
class Linear:
    """A linear layer: its widths and its adapter's rank (0: none)."""

    inputs: int
    outputs: int
    rank: int

    def weights(self, adapter: bool = True) -> int:
        """Number of weights, with or without those of the adapter."""
        return self.inputs * self.outputs + adapter * self.adapter

    @property
    def adapter(self) -> int:
        """Weights of the adapter."""
        return self.rank * (self.inputs + self.outputs)


class Block:
    """A decoder block of one attention and one feed-forward, and what autograd keeps of it, in bytes a token.

    Args:
        layer: the block, on the meta device, with its adapters. index: its place.
        config: the text model's configuration. size: bytes of a weight that is not quantised.
        args: the run's settings. attention: its implementation.

    Raises:
        ValueError: the block is of another kind.
    """

    def __init__(self, layer: nn.Module, index: int, config: Any, size: int, args: LPAConfig, attention: str) -> None:
        self.size, self.eager = size, attention == "eager"
        self.full, self.dropout = not args.lora, args.lora_dropout > 0
        half, feed_forward = in_block(layer, index, "attn"), in_block(layer, index, "mlp")
        self.attention = _linears(half, index)
        self.feed_forward = _linears(layer if _linear(feed_forward) else feed_forward, index)
        self.linears = [*self.attention, *self.feed_forward]
        self.bytes = sum(p.nbytes for p in layer.parameters())
        self.width, self.heads = int(config.hidden_size), int(config.num_attention_heads)
        self.inner, self.queries = self.feed_forward[-1].inputs, self.attention[-1].inputs
        self.keys = self.queries * (getattr(config, "num_key_value_heads", None) or self.heads) // self.heads
        norms = [module for module in layer.children() if "Norm" in type(module).__name__]
        self.norms, self.layer_norm = len(norms), any(isinstance(norm, nn.LayerNorm) for norm in norms)
        self.parallel = bool(getattr(config, "use_parallel_residual", False))  # both halves read the same hidden states
        self.normed = any("Norm" in type(module).__name__ for module in half.children())  # queries and keys, each head

    def kept(self, length: int, masked: bool, attack: bool) -> int:
        """Bytes that the backward pass needs, for the gradients of perturbations (attack) or of weights."""
        kept = self._norms(attack) + self._scores(length, masked) + self.activation
        return kept if attack else kept + self._inputs()

    @property
    def activation(self) -> int:
        """Bytes kept of the activation: its input, and for act(gate) * up also its output and up."""
        gated = sum(each.outputs for each in self.feed_forward[:-1]) > self.inner
        return self.inner * self.size * (3 if gated else 1)

    def transient(self, attack: bool) -> int:
        """Bytes that exist during the backward pass alone: gradients of act and up, and of a hidden state."""
        wide = self.size if attack or self.full else F32
        return 2 * self.inner * wide + self.width * self.size

    def _norms(self, attack: bool) -> int:
        """Each norm's input, float32 in an RMS norm; where its weights are trained, the normalised states as well."""
        heads = self.queries + self.keys if self.normed else 0
        inputs = (1 if self.parallel else self.norms) * self.width + heads
        trained = self.full and not attack and not self.layer_norm
        normalised = self.norms * self.width + heads if trained else 0
        return inputs * (self.size if self.layer_norm else F32) + normalised * self.size

    def _scores(self, length: int, masked: bool) -> int:
        """Queries, keys and values (repeated for the queries' heads), the output; and of each row of scores: all of
        them (eager), or a sum a head and the mask that torch makes numbers of in every layer."""
        fused = len(self.attention) == 2 and self.keys == self.queries  # values are a view that keeps all three
        kept = (6 if fused else 4) * self.queries * self.size
        if self.eager:
            return kept + self.heads * length * (F32 if self.size == F32 else F32 + self.size)
        return kept + self.heads * F32 + masked * length * self.size

    def _inputs(self) -> int:
        """Inputs of the layers that are trained or have adapters, and the adapters' inner states. Adapters are float32,
        so that each casts its input from another dtype; under dropout each has an input and a factor of its own."""
        total = 0
        for layers in (self.attention[:-1], self.attention[-1:], self.feed_forward[:-1], self.feed_forward[-1:]):
            width, adapted = layers[0].inputs, sum(each.rank > 0 for each in layers)
            total += sum(each.rank for each in layers) * F32
            if self.dropout and adapted:
                total += adapted * width * 2 * F32  # on a GPU a factor is one byte
            elif layers[0] is self.attention[-1] and self.size == F32:
                continue  # attention's output, which is kept already
            elif self.full:
                total += width * self.size
            else:
                total += width * F32 * (min(adapted, 1) if self.size == F32 else adapted)
        return total


def _linear(module: nn.Module) -> Linear | None:
    """The linear layer of a module, adapter or not; None for any other module."""
    base: Any = getattr(module, "base_layer", module)
    turned = type(base).__name__ == "Conv1D"  # transformers' own, [inputs, outputs]
    if not turned and not isinstance(base, nn.Linear):
        return None
    inputs, outputs = base.weight.shape if turned else base.weight.shape[::-1]
    return Linear(inputs, outputs, sum((getattr(module, "r", None) or {}).values()))


def _linears(half: nn.Module, index: int) -> list[Linear]:
    """The linear layers of a block's half in order of definition; the last one makes its output."""
    found = [linear for linear in map(_linear, half.children()) if linear]
    others = [type(m).__name__ for m in half.children() if not _linear(m) and any(p.dim() > 1 for p in m.parameters())]
    if len(found) < 2:
        beside = f" beside {', '.join(others)}" if others else ""
        raise ValueError(
            f"block {index}: {type(half).__name__} has {len(found)} linear layers{beside}; lpa plan knows decoders "
            "whose blocks have one attention and one feed-forward of linear layers"
        )
    return found


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
        args: the run's settings. The stack is planned as the packed engine, of which it keeps less.
        shape: of its rows.
        dtype: of the weights; by default the configuration's.
        quantized: one of `FOUR_BIT`, `FOUR_BIT_NESTED`, `EIGHT_BIT`, or None.
        ranks: that run it, by DDP or, with `args.fsdp`, FSDP2.

    Raises:
        ValueError: a setting, a length or a kind of model that the plan does not know.

    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    >>> estimate(tiny, LPAConfig("run", use_cpu=True), PlanShape(prompt=8, completion=3)).tokens
    48
    """
    shape = shape or PlanShape()
    optim = str(getattr(args.optim, "value", args.optim))
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(shape.prompt + shape.completion, shape.benign_prompt + shape.benign_answer)
    if quantized and not args.lora:
        raise ValueError(f"lora=False trains all weights, and {quantized} ones cannot be trained")
    if args.kl == "public" and "kl" in args.coefs:
        raise ValueError("kl='public' is not planned; plan 'standard'")
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"optim={optim!r} is not planned; plan adamw_torch")
    if ranks < 1 or (args.fsdp and ranks == 1):
        raise ValueError(f"ranks={ranks} must be at least {2 if args.fsdp else 1}{' with fsdp' if args.fsdp else ''}")
    if context and longest > context:
        raise ValueError(f"rows of {longest} tokens are longer than the model's context of {context}; shorten them")
    model = on_meta(config, args, dtype or getattr(config, "dtype", None), attn_implementation, trust_remote_code)
    run = Run(model, args, shape, quantized, ranks)
    phases = {"weights": run.static()}
    if args.inner_steps:
        phases["attack"] = max(run.attack_moments(), key=Counter.total)
    phases["defence"] = max(run.defence_moments(), key=Counter.total)
    passes = args.lpa_steps * run.micro * ranks
    return Estimate(
        phases,
        run.attack_flops() * args.inner_steps * passes,
        run.defence_flops() * args.defence_steps * passes,
        run.trained,
        run.total,
        run.pairs.rows,
        run.pairs.tokens,
    )


def on_meta(config: Any, args: LPAConfig, dtype: torch.dtype | None, attention: str | None, trusted: bool) -> Any:
    """The model to train: shapes without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, attn_implementation=attention, trust_remote_code=trusted
        )
        return add_adapters(model, args)


class Run:
    """One rank's memory (bytes) and work (operations of a micro-batch's pass, two for a product and its sum)."""

    def __init__(self, model: Any, args: LPAConfig, shape: PlanShape, quantized: str | None, ranks: int) -> None:
        self.args, self.quantized, self.ranks = args, quantized, ranks
        self.sharers = ranks if args.fsdp else 1  # of a weight
        self.micro = args.gradient_accumulation_steps
        head = model.get_output_embeddings().weight
        self.vocabulary, self.head, self.size = head.shape[0], head.nbytes, head.element_size()
        self.tied = head is model.get_input_embeddings().weight
        self.attention = model.config._attn_implementation or "sdpa"
        layers, text = decoder_layers(model), model.config.get_text_config()
        self.blocks = [Block(layer, i, text, self.size, args, self.attention) for i, layer in enumerate(layers)]
        self.linears = [linear for block in self.blocks for linear in block.linears]
        named = args.attack_sites or default_sites(len(layers))
        self.sites = resolve_sites(model, [int(site) if site.isdigit() else site for site in map(str, named)])
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.trained_bytes = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
        self.total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
        self.pairs = self._pairs(shape)
        self.benign = self._benign(shape) if set(BENIGN_TERMS) & set(args.coefs) else None
        tokens = ("prompt" in args.attack_on) * shape.prompt + ("completions" in args.attack_on) * shape.completion
        widths = (getattr(site.module, "out_features", self.blocks[0].width) for site in self.sites)
        self.delta = sum(widths) * tokens * args.per_device_train_batch_size * F32

    def _pairs(self, shape: PlanShape) -> Pass:
        """Packed: the prompt once and both completions, each without its last token; else a row for each text. The
        reference engine runs its head on every token."""
        pairs, text = self.args.per_device_train_batch_size, shape.prompt + shape.completion
        scored = 2 * pairs * shape.completion
        if self.args.attack_engine == "reference":
            return Pass(2 * pairs, text, scored, 2 * pairs * text, parts=2)
        if self.attention in ("eager", "sdpa"):
            return Pass(pairs, text + shape.completion - 2, scored, scored, masked=True)
        return Pass(2 * pairs, text - 1, scored, scored)

    def _benign(self, shape: PlanShape) -> Pass:
        rows = self.args.per_device_train_batch_size
        scored = rows * shape.benign_answer
        return Pass(rows, shape.benign_prompt + shape.benign_answer - 1, scored, scored)

    def static(self) -> Counter[str]:
        """Weights and adapters. FSDP2 shares all but quantised ones."""
        if self.quantized:
            weights = (self.total - sum(w.weights(False) for w in self.linears)) * self.size
            weights += round(sum(map(self._few_bits, self.linears)))
        else:
            weights = self.total * self.size // self.sharers
        return Counter({"weights": weights, "adapters": self.trained_bytes // self.sharers * self.args.lora})

    def _few_bits(self, linear: Linear) -> float:
        """Values and scales: float32 for 64 weights, or 8 bits for them and float32 for 256 of those; one a row."""
        weights = linear.weights(False)
        if self.quantized == EIGHT_BIT:
            return weights + F32 * linear.outputs
        return weights / 2 + (weights / 64 * (1 + F32 / 256) if self.quantized == FOUR_BIT_NESTED else weights / 16)

    def _always(self, optimiser: bool) -> Counter[str]:
        """What exists at every moment of an LPA step's last micro-batch: DDP's buckets, AdamW's moments, and the
        gradients of the other micro-batches (whole, also under FSDP2, which scatters them with the last one's)."""
        parts = self.static()
        parts["gradients"] = self.trained_bytes * (self.micro > 1)
        parts["buckets"] = self.trained_bytes * (self.ranks > 1 and not self.args.fsdp)
        parts["optimiser"] = 2 * self.trained_bytes // self.sharers * optimiser
        return parts

    def _moment(self, always: Counter[str], activations: int, logits: int, gathered: int) -> Counter[str]:
        more = {"activations": activations, "logits": logits, "gathered": gathered * bool(self.args.fsdp)}
        return always + Counter(more)

    def _copies(self) -> int:
        """Merged: a copy of the adapted weights. Otherwise the adapters in the weights' dtype, if it is not float32."""
        if self.args.attack_merge_adapters:
            return sum(w.weights(False) for w in self.linears if w.rank) * self.size // self.sharers
        return self.trained * self.size * (self.args.lora and self.size < F32 and not self.args.fsdp)

    def _of_block(self, what: Pass, block: Block, attack: bool) -> int:
        return block.kept(what.length, what.masked, attack) * what.tokens

    def _kept(self, what: Pass, blocks: Sequence[Block], attack: bool) -> int:
        """Activations of a pass: of every block, or with checkpointing its input alone."""
        if self.args.gradient_checkpointing:
            return sum(block.width * self.size for block in blocks) * what.tokens
        return sum(self._of_block(what, block, attack) for block in blocks)

    def _in_backward(self, what: Pass, attack: bool) -> int:
        """What the last block's backward pass needs in addition: its products, a checkpointed block that runs again, a
        dequantised weight."""
        block = self.blocks[-1]
        again = self._of_block(what, block, attack) if self.args.gradient_checkpointing else 0
        weight = max(w.weights(False) for w in block.linears) * self.size if self.quantized else 0
        parts = 1 if attack else what.parts  # an attack was measured to hold both texts' until it has its gradients
        return (again + block.transient(attack) * what.tokens) // parts + weight

    def _beside(self, what: Pass) -> int:
        """Logits of all tokens of one text, from which the reference engine takes its rows."""
        return what.headed // what.parts * self.vocabulary * self.size if what.headed > what.scored else 0

    def attack_moments(self) -> Iterator[Counter[str]]:
        """The peaks of an attack: the head's backward pass, the last block's, and under FSDP2 the start."""
        what, args, block = self.pairs, self.args, self.blocks[-1]
        always = self._always(optimiser=not args.reset_optimizer)
        always["gradients"] = 0  # all micro-batches are attacked before the first update
        always["logits"] = self._base_logits
        always["perturbations"] = self.delta * (self._held + MOMENTS.get(args.attack_rule, 0))
        always["copies"] = self._copies()
        kept = self._kept(what, self.above, attack=True)
        if self.trims and not args.gradient_checkpointing:
            kept -= block.activation * what.unscored
        logits = what.scored * self.vocabulary
        if logits >= CHUNK_FROM and what.headed == what.scored and not args.fsdp:
            logits = CHUNK
        logits *= 2 * F32 + (self.size if self.size < F32 else 0)  # as they are, in float32, and their gradient
        yield self._moment(always, kept, logits + self._beside(what), self.head + block.bytes)
        yield self._moment(always, kept + self._in_backward(what, True), 0, self.head + 2 * block.bytes)
        if args.fsdp and not self.tied:  # the embedding comes while the head is whole
            yield self._moment(always, 0, 0, 3 * self.head)

    def defence_moments(self) -> Iterator[Counter[str]]:
        """The peaks of an update: the same, and the end of the backward pass, when all gradients exist."""
        args, block = self.args, self.blocks[-1]
        passes = self._defence_passes()
        always = self._always(optimiser=True)
        always["perturbations"] = self.delta * self._held * (args.attack_steps > 0)
        always["logits"] = self._base_logits
        kept = sum(self._kept(each, self.blocks, attack=False) for each in passes)
        logits = sum(3 * F32 * each.scored * self.vocabulary + self._beside(each) for each in passes)
        own = self.head * (not args.lora)  # the head's gradient; that of a tied one waits for the embedding's
        yield self._moment(always, kept + own, logits, (1 if self.tied else 2) * self.head)
        products = max(self._in_backward(each, attack=False) for each in passes)
        held = self.head * self.tied
        yield self._moment(always, kept + products + own * self.tied, 0, held + 2 * block.bytes)
        if args.fsdp and self.tied:
            yield self._moment(always, 0, 0, 2 * self.head + block.bytes)
        always["gradients"] = max(always["gradients"], self.trained_bytes // self.sharers)
        yield self._moment(always, 0, 0, held)

    @property
    def _held(self) -> int:
        """Micro-batches whose perturbations and base logits are on the device at once."""
        return 1 if self.args.offload_attacks else self.micro

    @property
    def _base_logits(self) -> int:
        """Bytes of the base model's logits of benign rows."""
        if not self.benign or "kl" not in self.args.coefs:
            return 0
        return self._held * self.benign.scored * self.vocabulary * self.size

    @property
    def above(self) -> list[Block]:
        """The blocks that the perturbation's gradient passes through."""
        return self.blocks[min(_first_after(site) for site in self.sites) :]

    @property
    def trims(self) -> bool:
        """Whether an attack runs the last block's feed-forward on the scored rows alone."""
        last = len(self.blocks) - 1
        return self.args.attack_engine != "reference" and all(site.layer != last for site in self.sites)

    def _defence_passes(self) -> list[Pass]:
        pairs = [self.pairs] if self.args.pair_objective else []
        return pairs + ([self.benign] if self.benign else [])

    def _forward(self, what: Pass, blocks: Sequence[Block], adapters: bool = True) -> float:
        """Tokens x weights, and attention's scores and sums over a row; without the head."""
        weights = sum(w.weights(adapters) for block in blocks for w in block.linears)
        return 2.0 * what.tokens * (weights + 2 * what.length * sum(block.queries for block in blocks))

    def _backward(self, what: Pass, blocks: Sequence[Block], adapters: bool = True) -> float:
        """Hidden states' gradients: each product again, attention's twice; fused attention makes its scores anew."""
        more = 2 if self.attention == "eager" else 3
        scores = 2.0 * what.tokens * what.length * sum(block.queries for block in blocks)
        return self._forward(what, blocks, adapters) + more * scores

    def _head_flops(self, what: Pass) -> float:
        return 2.0 * what.headed * self.head / self.size

    def attack_flops(self) -> float:
        """Work of an inner step."""
        what, adapters = self.pairs, not self.args.attack_merge_adapters
        work = self._forward(what, self.blocks, adapters) + self._backward(what, self.above, adapters)
        if self.args.gradient_checkpointing:
            work += self._forward(what, self.above, adapters)
        if self.trims:
            work -= 4 * what.unscored * sum(w.weights(adapters) for w in self.blocks[-1].feed_forward)
        return work + 2 * self._head_flops(what)

    def defence_flops(self) -> float:
        """Work of an update, with the gradients of what is trained; of benign terms the mean over updates."""
        total = 0.0
        for what in self._defence_passes():
            forward = self._forward(what, self.blocks)
            work = forward * (2 if self.args.gradient_checkpointing else 1) + self._backward(what, self.blocks)
            work += (2 if self.args.lora else 3) * self._head_flops(what)
            work += 2.0 * what.tokens * sum(w.adapter if self.args.lora else w.weights() for w in self.linears)
            total += work / (self.args.benign_every if what is self.benign else 1)
        return total


def _first_after(site: Site) -> int:
    """The first block whose activations the gradient of a perturbation at a site needs."""
    if site.layer is None:
        return 0
    return site.layer + 1 if site.name.startswith(("mlp:", "block:")) else site.layer
