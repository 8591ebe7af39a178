"""A layout's pass through a frozen stack instead of the model's own code, and the check that both are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..model.blocks import UnsupportedStack, read_decoder
from ..model.facts import hooks_everywhere, hooks_on, model_key, remembered
from ..model.sharding import is_sharded
from ..model.sites import KINDS, Site, decoder_layers, in_block, unwrapped
from ..model.stack import FrozenStack, Span, Stream, observed
from ..model.walk import modules_of, spread_over
from .layout import PADDING, Layout
from .loop import Differentiable, HookedForward
from .passes import layout_hidden, layout_logits
from .probe import FLOAT32_TOLERANCE
from .settings import AttackSettings

_HALF_TOLERANCE = 0.2  # of the root mean square: half precision alone moves both ways' gradients by some percent


class Streams:
    """A layout's tokens without padding: `main` is run every step, `before` once, since nothing in it ever changes.

    Attributes:
        main, before: streams; the latter is None where every row is attacked or scored from its first token on.
        order: [N] int64, which of `main`'s scored tokens predicts each label.
        row_tokens: [R, K] int64, the layout's in numbers of `main`, -1 = none.
    """

    def __init__(self, layout: Layout) -> None:
        rows, length = layout.shape
        index = torch.arange(length, device=layout.branch.device).expand(rows, length)
        there = layout.branch != PADDING
        scored = torch.zeros_like(there).flatten().index_fill_(0, layout.places, True).view(rows, length)
        attacked = layout.token_rows.view(rows, length) >= 0
        first = torch.where(attacked | scored, index, length).amin(1)
        kept = torch.where(first == length, 0, first)  # a row without either is run as it is
        live = there & (index >= kept[:, None])
        self.main = _stream(layout, live, scored & live, kept)
        self.before = None
        if int(kept.sum()):
            self.before = _stream(layout, there & ~live, torch.zeros_like(there), torch.zeros_like(kept))
        number = torch.full((rows * length,), -1, device=index.device)
        number[self.main.places] = torch.arange(len(self.main.places), device=index.device)
        tokens = layout.row_tokens
        self.row_tokens = torch.where(tokens >= 0, number[tokens.clamp(min=0)], -1)
        places = self.main.places[self.main.scored]
        rank = torch.zeros_like(number).index_copy_(0, places, torch.arange(len(places), device=index.device))
        self.order = rank[layout.places]


def _stream(layout: Layout, live: Tensor, scored: Tensor, kept: Tensor) -> Stream:
    """The tokens of `live` [B, L], of which `scored` predict labels, after `kept` [B] that are not among them."""
    places = live.flatten().nonzero()[:, 0]
    number = torch.full((live.numel(),), -1, device=live.device)
    number[places] = torch.arange(len(places), device=live.device)
    spans, start, scored_start = [], 0, 0
    counts = torch.stack([live.sum(1), kept, scored.sum(1)], 1).tolist()
    for count, before, predicting in counts:
        spans.append(Span(start, count, before, scored_start, predicting))
        start, scored_start = start + count, scored_start + predicting
    return Stream(
        ids=layout.input_ids.flatten()[places],
        rows=layout.token_rows[places],
        places=places,
        scored=number[scored.flatten().nonzero()[:, 0]],
        spans=spans,
    )


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

    Raises:
        UnsupportedStack: the model or a site is of another kind.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, sites: Sequence[Site], layout: Layout, backend: str) -> None:
        decoder = read_decoder(model)
        self.head = decoder.head
        streams = Streams(layout)
        self.row_tokens, self.order = streams.row_tokens, streams.order
        with observed(model) as (given, inputs):
            layout_hidden(model, layout)
        hidden = inputs[0].flatten(0, 1)
        before = None
        if streams.before is not None:
            before = FrozenStack(decoder, [], streams.before, given, hidden[streams.before.places], backend=backend)
        self.names = [_place(model, site) for site in sites]
        places = streams.main.places
        self.stack = FrozenStack(decoder, self.names, streams.main, given, hidden[places], before, backend)

    @contextmanager
    def __call__(self, deltas: Sequence[Tensor], hidden: bool) -> Iterator[Differentiable]:
        scored = self.stack.forward(dict(zip(self.names, deltas, strict=bool(deltas))))

        def back(grad: Tensor) -> list[Tensor]:
            found = self.stack.backward(torch.zeros_like(scored).index_add_(0, self.order, grad))
            return [found[name] for name in self.names]

        rows = scored[self.order]
        if hidden:
            rows.requires_grad_()
            yield Differentiable(rows, lambda output, grad: back(torch.autograd.grad(output, rows, grad)[0]))
            return
        with torch.no_grad():
            logits = self.head(rows)
            slope = self.head.slope(logits)
        yield Differentiable(logits, lambda output, grad: back(self.head.back(grad, slope)))


def why_not_stacked(model: nn.Module, sites: Sequence[Site], settings: AttackSettings, layout: Layout) -> str:
    """Why a packed layout cannot be run by a frozen stack; "" where it can, with the model's own values and gradients.

    What can be read off the model is read each time, since weights may be exchanged. Values and gradients are compared
    on the batch at hand, once for a state of the model, its sites, and each doubling of the rows' length.
    """
    if settings.autocast is not None:
        return f"autocast={settings.autocast} is for the model's own code"
    if is_sharded(model):
        return "its weights are sharded over ranks"
    if reason := spread_over(model):
        return reason
    if hooks_everywhere():
        return "there are hooks on all modules"
    for module in modules_of(model):  # hooks of our own may be on it too, which its key does not name
        if hooks_on(module):
            return f"there are hooks on it, on {type(module).__name__} for one"
    key = model_key(model), tuple(site.name for site in sites), settings.merge_adapters, layout.shape[1].bit_length()

    def compared() -> str:
        try:
            return _difference(model, sites, layout)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does not like about it is a reason not to do it
            return str(error) if isinstance(error, UnsupportedStack) else f"it raised {type(error).__name__}: {error}"

    return remembered(model, "stacks", key, compared)


def _difference(model: nn.Module, sites: Sequence[Site], layout: Layout) -> str:
    """How the stack's logits or gradients differ from those of the model's own code; "" if by rounding alone."""
    stacked = StackForward(model, sites, layout, "auto")
    plain = HookedForward(model, sites, layout, "auto")
    draw = torch.Generator().manual_seed(0)
    rows = len(layout.row_tokens)
    with torch.no_grad(), stacked([], False) as ours:
        if reason := _apart("logits", ours.values, layout_logits(model, layout)):
            return reason
    width = stacked.stack.start[1].shape[1]
    deltas = [(torch.randn(rows, width, generator=draw) * 0.01).to(layout.branch.device) for _ in sites]
    with plain(deltas, True) as theirs, stacked(deltas, True) as ours:
        grad = torch.randn(theirs.values.shape, generator=draw).to(theirs.values)
        wanted, found = theirs.gradients(theirs.values, grad), ours.gradients(ours.values, grad)
    places = stacked.stack.stream.places
    for site, one, other in zip(sites, found, wanted, strict=True):
        if reason := _apart(f"gradients at {site.name}", one, other[places]):
            return reason
    return ""


def _apart(what: str, ours: Tensor, theirs: Tensor) -> str:
    if theirs.dtype in (torch.float32, torch.float64):
        scale = float(theirs.abs().max())
        error, within = float((ours - theirs).abs().max()), FLOAT32_TOLERANCE * scale
    else:
        error, scale = (float(t.float().square().mean().sqrt()) for t in (ours.float() - theirs.float(), theirs))
        within = _HALF_TOLERANCE * scale
    return "" if error <= within else f"its {what} differ from the model's own by {error:.1e} of {scale:.1e}"
