"""A layout's pass through a frozen stack instead of the model's own code, and the check that both are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..model.blocks import UnsupportedStack, read_decoder
from ..model.facts import hooks_everywhere, hooks_on, model_key, remembered, text_config
from ..model.hooks import forwards
from ..model.joined import groups_of
from ..model.modes import as_if_trained
from ..model.sharding import is_sharded
from ..model.sites import KINDS, Site, decoder_layers, in_block, unwrapped
from ..model.stack import FrozenStack, Tokens, observed, rules_of
from ..model.walk import modules_of, spread_over
from .batch import PairBatch
from .layout import PADDING, Layout, pack
from .loop import Differentiable, HookedForward
from .passes import layout_hidden
from .probe import FLOAT32_TOLERANCE
from .sample import sample
from .settings import AttackSettings
from .verdicts import HALF_TOLERANCE, ROUNDINGS, largest, rounded_embeddings, rounded_up

_HALF_GRADIENTS = 0.2  # of the root mean square: half precision alone moves both ways' by some percent
_HALVES = (torch.float16, torch.bfloat16)
_ROWS = 8  # of logits that are compared at once


class Streams:
    """A layout's tokens without padding: `main` is run every step, `before` once, since nothing in it ever changes.

    They are laid out on the host, from one read of the device.

    Attributes:
        main, before: tokens; the latter is None where every row is attacked or scored from its first token on.
        order: [N] int64, which of `main`'s scored tokens predicts each label.
        row_tokens: [R, K] int64, the layout's in numbers of `main`, -1 = none.
    """

    def __init__(self, layout: Layout) -> None:
        device, (rows, length) = layout.branch.device, layout.shape
        parts = [layout.branch, layout.position_ids, layout.token_rows, layout.input_ids, layout.places]
        read = torch.cat([part.flatten() for part in parts]).cpu().split([part.numel() for part in parts])
        branch, position, row, ids = (part.view(rows, length) for part in read[:4])
        self.grid = _Grid(branch, position, row, ids, device)
        index = torch.arange(length).expand(rows, length)
        there = branch != PADDING
        scored = torch.zeros(rows * length, dtype=torch.bool).index_fill_(0, read[4], True).view(rows, length)
        first = torch.where((row >= 0) | scored, index, length).amin(1)
        kept = torch.where(first == length, 0, first)  # a row without either is run as it is
        early = there & (index < kept[:, None])
        self.main = self.grid.tokens(there & ~early, scored, early)
        self.before = None
        if bool(early.any()):
            nothing = torch.zeros_like(there)
            self.before = self.grid.tokens(early, nothing, nothing)
        places = (there & ~early).flatten().nonzero()[:, 0]
        number = torch.full((rows * length,), -1).index_copy_(0, places, torch.arange(len(places)))
        rank = (scored & ~early).flatten().cumsum(0) - 1
        self.order = rank[read[4]].to(device)
        tokens, number = layout.row_tokens, number.to(device)
        self.row_tokens = torch.where(tokens >= 0, number[tokens.clamp(min=0)], -1)


class _Grid(NamedTuple):
    """The places of padded rows on the host, all [B, L] int64: branch, position, row of the perturbation, token id."""

    branch: Tensor
    position: Tensor
    row: Tensor
    ids: Tensor
    device: torch.device

    def tokens(self, live: Tensor, scored: Tensor, early: Tensor) -> Tokens:
        """The tokens of `live` [B, L] bool; those of `scored` predict labels, those of `early` are kept before them."""
        places, seen = live.flatten().nonzero()[:, 0], live | early
        number = live.flatten().cumsum(0) - 1
        own = (seen.flatten().cumsum(0) - 1)[places] if bool(early.any()) else None
        return Tokens(
            ids=self.ids.flatten()[places].to(self.device),
            rows=self.row.flatten()[places].to(self.device),
            places=places.to(self.device),
            scored=number[(live & scored).flatten()].to(self.device),
            line=self._line(live),
            few=self._line(live & scored),
            keys=self._line(seen),
            own=None if own is None else own.to(self.device),
        )

    def _line(self, live: Tensor) -> ops.Stream:
        counts = live.sum(1)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        places = torch.stack([self.branch[live], self.position[live]], 1).int()
        return ops.Stream(places.to(self.device), starts.int().to(self.device), int(counts.max()) if len(counts) else 0)


def _place(model: nn.Module, site: Site) -> str:
    """What the stack calls a site, by its module, whatever name it goes by.

    Raises:
        UnsupportedStack: it is no embedding, block, or half of one.
    """
    if site.module is unwrapped(model.get_input_embeddings()):  # type: ignore[operator]
        return "embedding"
    if site.layer is not None:
        block = decoder_layers(model)[site.layer]
        for kind in KINDS:
            with suppress(ValueError):
                if in_block(block, site.layer, kind) is site.module:
                    return f"{kind}:{site.layer}"
    raise UnsupportedStack(f"the site {site.name!r} is neither the embedding nor a block or one of its halves")


class StackForward:
    """`loop.Forward` by a frozen stack.

    Args:
        compared: weights are joined where they were when the stack was compared with the model, and nowhere else; False
            for that comparison, which joins what it can.

    Raises:
        UnsupportedStack: the model or a site is of another kind.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, sites: Sequence[Site], layout: Layout, backend: str, compared: bool = True
    ) -> None:
        decoder = read_decoder(model)
        self.head = decoder.head
        streams = Streams(layout)
        self.row_tokens, self.order = streams.row_tokens, streams.order
        with observed(model) as (given, inputs):
            layout_hidden(model, layout)
        embedded = (decoder.embed(layout.input_ids) * decoder.embedding_scale == inputs[0]).all()
        rules = rules_of(given, layout.branch, layout.position_ids, embedded)
        self.names = [_place(model, site) for site in sites]
        if (groups := groups_of(model)) is not None:
            apart: dict[int, str] = remembered(model, "why maps were compared apart", model_key(model), dict)
            decoder.join(groups, apart if compared else None)  # moves weights: not before all refusals
            if not compared:
                apart.update((number, maps.apart) for number, maps in enumerate(decoder.maps))
        ops.note("products", decoder.products)
        before = None if streams.before is None else FrozenStack(decoder, [], streams.before, rules, backend=backend)
        self.stack = FrozenStack(decoder, self.names, streams.main, rules, before, backend)

    @contextmanager
    def __call__(self, deltas: Sequence[Tensor], hidden: bool) -> Iterator[Differentiable]:
        scored = self.stack.forward(dict(zip(self.names, deltas, strict=bool(deltas))))

        def back(grad: Tensor) -> list[Tensor]:
            found = self.stack.backward(torch.zeros_like(scored).index_add_(0, self.order, grad))
            return [found[name] for name in self.names]

        rows = scored[self.order]
        if hidden:
            rows.requires_grad_()
            yield Differentiable(lambda output, grad: back(torch.autograd.grad(output, rows, grad)[0]), hidden=rows)
            return
        with torch.no_grad():
            logits = self.head(rows)
            slope = self.head.slope(logits)

        def taken(output: Tensor, grad: Tensor) -> list[Tensor]:
            below = self.head.back(grad, slope)
            output.untyped_storage().resize_(0)  # else the caller holds the logits while most else is held too
            return back(below)

        yield Differentiable(taken, logits=logits)


def why_not_stacked(
    model: nn.Module, sites: Sequence[Site], settings: AttackSettings, batch: PairBatch, layout: Layout
) -> str:
    """Why a packed batch cannot be run by a frozen stack; "" where it can, with the model's own values and gradients.

    Hooks are looked for each time. Values and gradients are compared on two pairs of the batch at hand, for a state of
    the model, its sites and the ops' backend, and again for longer rows than those compared so far. A text of the pairs
    is as long as a row, so that no row has a later position. What is refused once is refused for longer rows too.

    Args:
        layout: the batch's.
    """
    if settings.autocast is not None:
        return f"autocast={settings.autocast} is for the model's own code"
    state = model_key(model)
    if reason := remembered(model, "never stacks", state, partial(_never, model)):
        return reason
    if hooks_everywhere():
        return "there are hooks on all modules"
    for module in modules_of(model):  # hooks of our own may be on it too, which its key does not name
        if hooks_on(module):
            return f"there are hooks on it, on {type(module).__name__} for one"
    key = state, tuple(site.name for site in sites), settings.merge_adapters, settings.backend
    compared: list[tuple[int, str]] = remembered(model, "stacks", key, list)
    length = layout.shape[1]
    for longest, reason in compared:
        if length <= longest or reason:
            return reason

    def difference(up_to: int) -> str:
        few = pack(sample(batch, up_to, of_text=True), first_position=layout.first_position)
        attacked = few if len(few.row_tokens) else layout
        try:
            with as_if_trained(model):
                return _difference(model, sites, attacked, settings.backend)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does not like about it is a reason not to do it
            return str(error) if isinstance(error, UnsupportedStack) else f"it raised {type(error).__name__}: {error}"

    for up_to in dict.fromkeys((rounded_up(length, text_config(model)), length)):
        if not (reason := difference(up_to)):
            break
    compared.append((up_to, reason))
    return reason


def _never(model: nn.Module) -> str:
    return "its weights are sharded over ranks" if is_sharded(model) else spread_over(model)


def _difference(model: nn.Module, sites: Sequence[Site], layout: Layout, backend: str) -> str:
    """How the stack's logits or gradients differ from those of the model's own code; "" if by rounding alone."""
    stacked = StackForward(model, sites, layout, backend, compared=False)
    plain = HookedForward(model, sites, layout, backend)
    draw = torch.Generator().manual_seed(0)
    rows = len(layout.row_tokens)
    width = stacked.head.linear.weight.shape[1]
    deltas = [(torch.randn(rows, width, generator=draw) * 0.01).to(layout.branch.device) for _ in sites]
    places = stacked.stack.tokens.places
    # blocks keep their inputs alone, and run again for their gradients: a check must not take more than the loop
    again = ((b, partial(checkpoint, b.forward, use_reentrant=False, preserve_rng_state=False))
             for b in decoder_layers(model))  # fmt: skip
    with forwards(again), plain(deltas, False) as theirs:
        assert theirs.logits is not None
        logits = theirs.logits.detach()
        grad = torch.randn(logits.shape, generator=draw).to(logits)
        wanted = [each[places] for each in theirs.gradients(theirs.logits, grad)]
    del theirs  # and the activations that it holds
    with stacked(deltas, False) as ours:
        assert ours.logits is not None
        if reason := _apart("logits", ours.logits, logits, HALF_TOLERANCE):
            if logits.dtype not in _HALVES:
                return reason
            with rounded_embeddings(model), plain(deltas, False) as rounded:
                assert rounded.logits is not None
                noise = _size(rounded.logits.detach() - logits) / _size(logits)
            if _apart("logits", ours.logits, logits, ROUNDINGS * noise):
                return reason
        del logits
        found = ours.gradients(ours.logits, grad)
    for site, one, other in zip(sites, found, wanted, strict=True):
        if reason := _apart(f"gradients at {site.name}", one.view(1, -1), other.view(1, -1), _HALF_GRADIENTS):
            return reason
    return ""


def _apart(what: str, ours: Tensor, theirs: Tensor, half: float) -> str:
    """half: the share of `theirs` that they may differ by in half precision."""
    scale, parts = _size(theirs), zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True)
    error = float(torch.tensor([_size(a - b) for a, b in parts]).amax())  # amax, unlike max, passes NaN on
    within = scale * (half if theirs.dtype in _HALVES else FLOAT32_TOLERANCE)
    return "" if error <= within else f"its {what} differ from the model's own by {error:.1e} of {scale:.1e}"


def _size(values: Tensor) -> float:
    return largest(values, values.dtype in _HALVES)
