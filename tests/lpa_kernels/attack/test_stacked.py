"""Attacks by the frozen stack: the plain passes' own for every architecture that it takes, and refused by name else."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tiny_models import build
from lpa_kernels import LatentPGD, PairBatch, ops
from lpa_kernels.attack import engine as engines
from lpa_kernels.attack import loop, stacked, verdicts
from lpa_kernels.attack.layout import PADDING, pack
from lpa_kernels.attack.stacked import HookedForward, StackForward, Streams
from lpa_kernels.model.blocks import UnsupportedStack
from lpa_kernels.model.facts import forget
from lpa_kernels.model.modes import inner_mode
from lpa_kernels.model.sites import resolve_sites
from lpa_kernels.ops import block_reference
from tests.support.batches import PLAIN, RAGGED, assert_same, attack_with, late, llama, pairs, with_lora
from tests.support.joining import joining
from tests.support.models import DEVICE, implementations, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "gemma2", "gemma3_text", "granite")
# plain descent: Adam makes a step of the sign of a gradient that is rounding alone
DESCENT = {"rule": "sgd", "step_size": 0.5, "epsilon": 0.3}
SITES = (["embedding", "mlp:1"], ["attn:1", "block:2"], ["mlp:3", "attn:3", "block:3"], ["block:0"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_attacks_are_those_of_plain_passes(family: str, lora: bool) -> None:
    """Ragged rows, one-token completions, windows that bind; prompts that are attacked, in part, and not at all.

    With a product a weight, as on a CPU, and with joined ones, as on a GPU.
    """
    model = tiny(family, attn=implementations(family)[-1])
    model = with_lora(model) if lora else model
    batches = pairs(RAGGED, "all"), pairs(RAGGED, "some"), late(pairs(RAGGED, "all"))
    for number, sites in enumerate(SITES):
        batch = batches[number % 3]
        want = attack_with(model, batch, sites, "reference", **DESCENT)
        for together in (False, True):
            with joining(together):
                got = attack_with(model, batch, sites, "stack", **DESCENT)
            assert (got.engine, got.reason) == ("stack", "")
            several = lora or family != "phi3"  # whose maps of one input are one weight
            assert got.kernels["products"] == ("joined" if together and several else "one a weight")
            assert_same(got, want, losses=1e-5)


def plain_norms(model: nn.Module) -> nn.Module:
    """The model with torch's own RMS norms, which compute in float64 where they are given it; transformers' do not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=1e-5, dtype=torch.float64)
            norm.weight.data = module.weight.data.double()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], norm)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3", "smollm3"])
@pytest.mark.parametrize("sites", SITES, ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_gradients_at_every_site_in_float64(family: str, sites: list[str], together: bool) -> None:
    model = with_lora(plain_norms(tiny(family, attn="sdpa", dtype=torch.float64)), dtype=torch.float64)
    layout = pack(pairs(RAGGED, "all"))
    found = resolve_sites(model, sites)
    draw = torch.Generator().manual_seed(1)
    with inner_mode(model), joining(together):
        ours, theirs = StackForward(model, found, layout, "reference"), HookedForward(model, found, layout, "reference")
        shape = (len(layout.row_tokens), model.config.hidden_size)
        deltas = [torch.randn(shape, dtype=torch.float64, generator=draw).to(DEVICE) * 0.1 for _ in found]
        with theirs(deltas, True) as wanted, ours(deltas, True) as got:
            assert float((got.hidden - wanted.hidden).detach().abs().max()) < 1e-9 * float(wanted.hidden.abs().max())
            grad = torch.randn(wanted.hidden.shape, dtype=torch.float64, generator=draw).to(DEVICE)
            places = ours.stack.tokens.places
            for one, other in zip(got.gradients(got.hidden, grad), wanted.gradients(wanted.hidden, grad), strict=True):
                assert float((one - other[places]).abs().max()) < 1e-9 * float(other.abs().max())


OPTIONS: dict[str, dict[str, Any]] = {
    "kl": {"coefs": {"toward": 1.0, "kl": 0.3}},
    "dpo": {"coefs": {"dpo": 1.0}},
    "ipo, reference free": {"coefs": {"ipo": 0.5}, "reference_free": True, "step_size": 0.05},
    "toward alone": {"coefs": {"toward": 1.0}},
    "penalty and clip": {"l2_penalty": 0.5, "clip_grad": 0.01},
    "sequence, stop": {"norm": "l2_sequence", "stop_below": 4.4},
    "relative, random start": {"relative": True, "epsilon": 0.02, "random_start": True, "seed": 3},
    "merged": {"merge_adapters": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_settings(options: dict[str, Any]) -> None:
    model = llama(lora=True)
    for sites in (["embedding", "mlp:1"], ["mlp:2"]):
        given = DESCENT | options
        got, want = (attack_with(model, pairs(), sites, engine, **given) for engine in ("stack", "reference"))
        assert_same(got, want, losses=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_head_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2's and granite's heads do more than a product, and are run whole."""
    want = attack_with(tiny(family), pairs(), ["embedding"], "reference", **DESCENT)
    monkeypatch.setattr(loop, "CHUNK_FROM", 1)
    assert_same(attack_with(tiny(family), pairs(), ["embedding"], "stack", **DESCENT), want, losses=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("together", [False, True])
def test_half_precision_is_as_near_to_float32_as_the_model_itself(dtype: torch.dtype, together: bool) -> None:
    """By the first steps' gradients' effect over some batches: how far deltas are off, and those of plain passes."""
    off = {"stack": 0.0, "reference": 0.0}
    for seed in range(4):
        batch, options = pairs(seed=seed), {"rule": "sgd", "epsilon": 1e3}
        exact = attack_with(tiny("llama"), batch, ["embedding", "mlp:1"], "reference", **options)
        for engine in off:
            with joining(together):
                found = attack_with(tiny("llama", dtype=dtype), batch, ["embedding", "mlp:1"], engine, **options)
            errors = [(found.deltas[n] - exact.deltas[n]).norm() / exact.deltas[n].norm() for n in exact.deltas]
            off[engine] += float(max(errors)) / 4
    assert off["stack"] < 1.5 * off["reference"] + 1e-3, off


def test_no_row_is_padded_and_constant_rows_run_once() -> None:
    batch = late(pairs(RAGGED, "all"))
    layout = pack(batch)
    streams = Streams(layout)
    tokens = int((layout.branch != PADDING).sum())
    assert streams.before is not None
    assert len(streams.main.places) + len(streams.before.places) == tokens
    prompts = [prompt for prompt, *_ in RAGGED]
    assert len(streams.before.places) == sum(max(prompt - 1, 0) for prompt in prompts)  # the last predicts a label
    every = Streams(pack(pairs(RAGGED, "all")))
    assert every.before is None
    assert len(every.main.places) == tokens


def test_auto_takes_it_where_it_is_exact_and_says_why_not_elsewhere() -> None:
    cases = {
        "llama": ("stack", ""),
        "gpt2": ("packed", "no module with its blocks"),
        "mixtral": ("packed", "block 0.mlp"),
        "bloom": ("unshared", "position"),
    }
    for family, (engine, reason) in cases.items():
        found = attack_with(tiny(family), pairs(), ["embedding"], "auto")
        if DEVICE == "cpu":
            assert found.engine == engine, family
        assert reason in found.reason or DEVICE != "cpu"


def test_engine_stack_says_why_it_cannot() -> None:
    with pytest.raises(RuntimeError, match=r"engine='stack' cannot run GPT2LMHeadModel: .* no module with its blocks"):
        attack_with(tiny("gpt2"), pairs(), ["embedding"], "stack")
    with pytest.raises(RuntimeError, match=r"the site 'model.layers.1.mlp.gate_proj' is neither the embedding nor a"):
        attack_with(tiny("llama"), pairs(), ["model.layers.1.mlp.gate_proj"], "stack")
    with pytest.raises(RuntimeError, match=r"autocast=torch.bfloat16 is for the model's own code"):
        attack_with(tiny("llama"), pairs(), ["embedding"], "stack", autocast=torch.bfloat16)


def test_a_hook_on_a_block_is_seen_between_two_attacks() -> None:
    model = tiny("llama")
    assert attack_with(model, pairs(), ["embedding"], "stack").engine == "stack"
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out * 1.5)
    with pytest.raises(RuntimeError, match=r"there are hooks on it, on LlamaDecoderLayer"):
        attack_with(model, pairs(), ["embedding"], "stack")
    want = attack_with(model, pairs(), ["embedding"], "reference", **DESCENT)
    assert_same(attack_with(model, pairs(), ["embedding"], "auto", **DESCENT), want, losses=1e-5)
    handle.remove()
    assert attack_with(model, pairs(), ["embedding"], "stack").engine == "stack"


def test_hidden_states_asked_for_leave_the_stack_and_hold_the_attack() -> None:
    """The first request leaves hooks of transformers' on every block for good: they record, and change nothing."""
    model, ids = tiny("llama"), pairs().rejected_ids
    model(ids, output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    attack = attack_with(model, pairs(), ["block:0"], "stack")
    assert attack.engine == "stack"
    given: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda block, inputs: given.append(inputs[0]))
    with torch.no_grad():
        clean = model(ids, output_hidden_states=True).hidden_states[1]
        with attack.applied():
            attacked = model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(attacked, given[-1])
    assert not torch.equal(attacked, clean)


def turned_back(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor], **options: Any) -> Any:
    """Attention with the rotation the other way round."""
    return ops.attention(q, k, v, (rotation[0], -rotation[1]), **options)


def off(*given: Any, **options: Any) -> None:
    ops.attention_backward_(*given, **options)
    given[6][1].zero_()  # the gradient of the keys


MISTAKES: dict[str, tuple[str, Any]] = {
    "another rotation": ("attention", turned_back),
    "a gradient that is off": ("swiglu_backward_", lambda gate, up, grad, act, backend: (gate.zero_(), up.zero_())),
    "another norm's gradient": ("add_norm_backward", lambda grad, r, rstd, weight, residual=None, backend="": grad),
    "keys without a gradient": ("attention_backward_", off),
}


class Mistaken:
    """The ops with one exchanged."""

    def __init__(self, name: str, mistake: Any) -> None:
        setattr(self, name, mistake)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)


@pytest.mark.parametrize(("name", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_a_stack_that_is_not_the_model_is_not_taken(name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpa_kernels.model.stack.ops", Mistaken(name, mistake))
    with pytest.raises(RuntimeError, match="differ from the model's own"):
        attack_with(tiny("llama"), pairs(PLAIN), ["embedding", "mlp:1"], "stack")


def test_weights_are_read_anew_for_every_attack() -> None:
    """A weight that was exchanged, or trained in place, is the one that the next attack runs with."""
    model = llama(lora=True)
    for change in (lambda p: p.data.mul_(1.5), lambda p: setattr(p, "data", p.data * 2.0)):
        attack_with(model, pairs(), ["embedding"], "stack")
        change(model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight)
        change(model.base_model.model.model.layers[2].self_attn.q_proj.lora_B["default"].weight)
        want = attack_with(model, pairs(), ["embedding"], "reference", **DESCENT)
        assert_same(attack_with(model, pairs(), ["embedding"], "stack", **DESCENT), want, losses=1e-5)


def test_the_defence_sees_the_attack_that_a_stack_found() -> None:
    model, batch = llama(lora=True), pairs(RAGGED)
    rows = {}
    for engine in ("stack", "reference"):
        pgd = LatentPGD(model, ["embedding", "mlp:1"], engine=engine, steps=3, step_size=0.05)
        found = pgd.attack(batch)
        rows[engine] = pgd.rows(batch, found).logits
        part = found.part(1, 3, batch.part(1, 3))
        assert part.layout is None or part.layout.packed
    assert torch.allclose(rows["stack"], rows["reference"], atol=2e-3)
    assert rows["stack"].requires_grad


def test_the_comparison_is_made_once_for_a_state_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = stacked._difference
    monkeypatch.setattr(stacked, "_difference", lambda *given: asked.append(1) or original(*given))
    model = tiny("llama")
    for _ in range(3):
        attack_with(model, pairs(), ["embedding"], "stack")
    assert len(asked) == 1
    attack_with(model, pairs([(60, 5, 5, 0)]), ["embedding"], "stack")  # rows of another length
    attack_with(model, pairs(), ["embedding", "mlp:1"], "stack")
    assert len(asked) == 3


def test_what_later_positions_change_is_compared_again() -> None:
    """Queries that are scaled from a position on. Rows of 34 and 60 tokens are of one doubling."""
    model = build("ministral3")
    with pytest.raises(RuntimeError, match="scales queries by their positions"):
        attack_with(model, pairs(), ["embedding"], "stack")
    scaled = copy.deepcopy(model.config)
    scaled.rope_parameters |= {"llama_4_scaling_beta": 5.0, "original_max_position_embeddings": 40}
    for block in model.model.layers:
        block.self_attn.config = scaled  # the model's own configuration says nothing of it
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    short, long, late = (pairs([(prompt, rest, rest, 0)]) for prompt, rest in ((20, 5), (25, 12), (45, 6)))
    assert attack_with(model, short, ["embedding"], "auto").engine == "stack"
    for batch in (long, late):  # the first has no position beyond 40, but rows of such a length
        found, want = (attack_with(model, batch, ["embedding"], engine, **DESCENT) for engine in ("auto", "reference"))
        assert (found.engine, "differ from the model's own" in found.reason) == ("packed", True)
        assert_same(found, want, losses=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_whose_logits_are_a_tenth_off_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision too, where gradients may be further apart."""
    own = stacked.StackForward.__init__

    def off(self: Any, *given: Any, **options: Any) -> None:
        own(self, *given, **options)
        self.head = replace(self.head, scale=1.15)

    monkeypatch.setattr(engines, "STACKS_ON", {DEVICE})
    model = tiny("llama", dtype=dtype, num_hidden_layers=1)
    assert attack_with(model, pairs(), ["embedding"], "auto").engine == "stack"
    forget(model)
    monkeypatch.setattr(stacked.StackForward, "__init__", off)
    found = attack_with(model, pairs(), ["embedding"], "auto")
    assert (found.engine, "its logits differ" in found.reason) == ("packed", True)


def test_a_batch_that_a_stack_does_not_take_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask, say, is another than that of the pairs that were compared."""

    def refuses(*given: Any) -> Any:
        raise UnsupportedStack("its mask is of another kind")

    monkeypatch.setattr(engines, "STACKS_ON", {DEVICE})
    model = tiny("llama")
    assert attack_with(model, pairs(), ["embedding"], "auto").engine == "stack"
    monkeypatch.setattr("lpa_kernels.attack.pgd.StackForward", refuses)
    found = attack_with(model, pairs(), ["embedding"], "auto")
    assert (found.engine, found.reason) == ("packed", "its mask is of another kind")
    with pytest.raises(RuntimeError, match="engine='stack' cannot run LlamaForCausalLM: its mask is of another kind"):
        attack_with(model, pairs(), ["embedding"], "stack")


def test_an_attack_explains_what_ran_it() -> None:
    model = tiny("llama")
    found = attack_with(model, pairs(), ["embedding"], "stack", backend="reference")
    block = {"add_norm", "add_norm_backward", "swiglu", "swiglu_backward_", "attention", "attention_backward_"}
    assert found.kernels.pop("products") == ("one a weight" if DEVICE == "cpu" else "joined")
    assert set(found.kernels) - {"rotate_"} == block | {"token_loss_", "pgd_update_"}
    assert set(found.kernels.values()) == {"reference"}
    told = found.explain().splitlines()
    assert told[0].startswith("engine: stack, ")
    assert "attention_backward_: reference" in told
    other = attack_with(tiny("gpt2"), pairs(), ["embedding"], "auto", backend="reference")
    assert "no module with its blocks" in other.explain() or DEVICE != "cpu"
    assert not block & set(other.kernels)


def test_an_op_without_a_faster_backend_says_why() -> None:
    found = attack_with(tiny("llama", dtype=torch.float64), pairs(), ["embedding"], "packed", rule="sgd")
    assert "reference (not " in found.kernels["token_loss_"]
    assert found.kernels["token_loss_"] in found.explain()


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for.

    `on_host` is for what works on a copy in the host's memory, one read, or with reads=0 for what reads on a CPU alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if op.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put) else ()
        waits = op.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
            torch.ops.aten.is_nonzero, torch.ops.aten.masked_select, torch.ops.aten.unique_dim,
        )  # fmt: skip
        waits |= any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.count += waits and not self.paused
        return op(*args, **(kwargs or {}))

    def on_host(self, function: Any, reads: int = 1) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.paused:
                return function(*args, **kwargs)
            self.count, self.paused = self.count + reads, True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False

        return counted


def test_the_host_reads_ten_times_an_attack_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that was attacked before, however many steps; none of these reads is in the loop."""
    model, batch, reads = llama(lora=True), pairs(), Reads()
    pgd = {steps: LatentPGD(model, ["embedding", "mlp:1"], engine="stack", steps=steps) for steps in (2, 5)}
    found = {steps: one.attack(batch).history["total"] for steps, one in pgd.items()}
    for module in (engines, verdicts):
        monkeypatch.setattr(module, "pack", reads.on_host(module.pack))
    monkeypatch.setattr(stacked, "Streams", reads.on_host(stacked.Streams))
    monkeypatch.setattr(block_reference, "_seen", reads.on_host(block_reference._seen, reads=0))
    monkeypatch.setattr(LatentPGD, "check_counts", lambda *_: None)
    monkeypatch.setattr(PairBatch, "counts", property(reads.on_host(PairBatch.counts.fget)))
    for steps, one in pgd.items():
        reads.count = 0
        with reads:
            again = one.attack(batch)
        assert 1 <= reads.count <= 10, steps
        assert torch.equal(again.history["total"], found[steps])


def test_large_tensors_that_are_not_saved_end_with_the_pass() -> None:
    """No tensor above 1 MB is alive after a forward pass but what `FrozenStack` saves, nor any after its backward.

    The mask that torch's own attention takes is made once, and lives as long as the tokens that it is of.
    """
    model = llama(lora=True, hidden_size=256, intermediate_size=512)
    batch = pairs([(150, 5, 7, 0)] * 8)
    layout = pack(batch)
    seen: list[weakref.ref[Tensor]] = []
    width: dict[int, int] = {}

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = op(*args, **(kwargs or {}))
            for out in found if isinstance(found, tuple | list) else (found,):
                if isinstance(out, Tensor) and out.untyped_storage().nbytes() > 1 << 20:
                    seen.append(weakref.ref(out))
            width[len(width)] = len(alive())
            return found

    def alive() -> set[int]:
        return {t.untyped_storage().data_ptr() for ref in seen if (t := ref()) is not None}

    def saved(part: Any) -> set[int]:
        if isinstance(part, Tensor):
            return {part.untyped_storage().data_ptr()}
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, tuple | list) else ()
        return set().union(*(saved(one) for one in parts)) if parts else set()

    with inner_mode(model), torch.no_grad():
        ours = StackForward(model, resolve_sites(model, ["embedding", "mlp:1"]), layout, "reference")
        rows = len(layout.row_tokens)
        deltas = [torch.zeros(rows, 256, device=DEVICE) for _ in range(2)]
        before = saved(list(ours.stack.start))
        with Made():
            scored = ours.stack.forward(dict(zip(ours.names, deltas, strict=True)))
            kept = saved(ours.stack.saved)
            before |= saved([part[-1].bias for made in block_reference._kept.values() for part in made.values()
                             if hasattr(part[-1], "bias")])  # fmt: skip
            assert alive() - before <= kept
            most = max(width.values())
            assert most <= len(kept | before) + 8, most  # the workspace: what one op of a block reads and writes
            gradients = ours.stack.backward(torch.ones_like(scored))
        assert not ours.stack.saved
        assert alive() - before <= saved(gradients)
