"""Joined weights: the same products, and weights that stay what they are to everything that saves or moves them."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lpa_kernels.model import joined as joined_weights
from lpa_kernels.model import modes
from lpa_kernels.model.facts import forget
from lpa_kernels.model.joined import Maps
from lpa_kernels.model.linear import Linear
from lpa_kernels.model.modes import inner_mode
from tests.support.batches import assert_same, attack_with, llama, pairs, with_lora
from tests.support.joining import joining
from tests.support.models import tiny

DESCENT = {"rule": "sgd", "step_size": 0.5, "epsilon": 0.3}


@pytest.fixture(autouse=True)
def joined() -> Iterator[None]:
    with joining():
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(given: Tensor, wanted: Tensor) -> bool:
    return bool((given - wanted).abs().max() <= 1e-12 * wanted.abs().max())


def a_linear(out: int, rank: int, bias: bool, seed: int) -> Linear:
    """What is read from a module of 6 inputs with an adapter of this rank (0 for none)."""
    module = nn.Linear(6, out, bias=bias, dtype=torch.float64).requires_grad_(False)
    if not rank:
        return Linear(module.weight, module.bias)
    return Linear(module.weight, module.bias, drawn(rank, 6, seed=seed), drawn(out, rank, seed=seed + 1), 0.7)


CASES: dict[str, list[tuple[int, int, bool]]] = {  # outputs, rank, bias
    "alone": [(8, 3, False)],
    "alone, without an adapter": [(8, 0, True)],
    "three": [(8, 2, False), (4, 2, False), (4, 2, False)],
    "ranks differ": [(8, 5, True), (4, 17, False), (3, 1, True)],
    "no adapter": [(8, 0, False), (4, 0, True)],
    "the first alone": [(8, 2, False), (4, 0, False)],
    "the last alone": [(8, 0, True), (4, 2, True)],
    "not the one between": [(8, 2, False), (4, 0, False), (4, 3, False)],
    "the one between": [(8, 0, False), (4, 2, True), (4, 0, False)],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_product_is_the_products_of_its_maps(case: list[tuple[int, int, bool]]) -> None:
    linears = [a_linear(*each, seed=10 * i) for i, each in enumerate(case)]
    x, widths = drawn(5, 6, seed=99), [out for out, *_ in case]
    wanted = [one(x) for one in linears]
    grads = [drawn(5, out, seed=50 + i) for i, out in enumerate(widths)]
    below = sum(one.back(grad) for one, grad in zip(linears, grads, strict=True))
    maps = Maps(linears)
    maps.join({})
    assert isinstance(below, Tensor)
    assert (maps.joined is None) == (len(case) == 1 and not case[0][1])  # one product as it is
    assert not maps.apart
    assert maps.sizes == widths
    y = maps(x)
    assert all(close(*both) for both in zip(maps.parts(y), wanted, strict=True))
    room = maps.room(x)
    for part in (room,) if isinstance(room, Tensor) else room:
        part.fill_(float("nan"))  # nothing that was not written may count
    assert close(maps.back(maps.filled(room, tuple(grads))), below)
    assert close(maps.back(torch.cat(grads, 1)), below)
    if len(case) == 1:
        base, low = maps.ahead(x)
        assert close(base if low is None else base + low[0] @ low[1].t(), wanted[0])


def test_maps_that_a_module_holds_as_one_weight() -> None:
    linear, x = a_linear(9, 2, True, seed=3), drawn(5, 6)
    apart = Maps([linear], [4, 5])
    wanted, grad = torch.cat(apart.parts(apart(x)), 1), drawn(5, 9, seed=1)
    below = apart.back(grad.split([4, 5], 1))
    del apart  # its views refer to the weight's memory
    maps = Maps([linear], [4, 5])
    maps.join({})
    assert maps.joined is not None
    assert close(torch.cat(maps.parts(maps(x)), 1), wanted)
    assert close(maps.back(grad), below)
    assert close(torch.cat([one(x) for one in maps.each], 1), wanted)


# ---- the model's weights ---------------------------------------------------------------------------------------------


def fingerprints(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        name: (tuple(t.shape), hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest())
        for name, t in model.state_dict().items()
    }


def attacked(model: Any, products: str = "joined", **options: Any) -> Any:
    found = attack_with(model, pairs(), ["embedding", "mlp:1"], "stack", **DESCENT, **options)
    assert found.kernels["products"] == products
    return found


def assert_attacks_right(model: Any, products: str = "joined", **options: Any) -> None:
    """The next attack is that of plain passes, which read the parameters."""
    want = attack_with(model, pairs(), ["embedding", "mlp:1"], "reference", **DESCENT)
    assert_same(attacked(model, products, **options), want, losses=1e-5)


def parts(model: Any, index: int = 1) -> list[nn.Parameter]:
    """Weights of queries, keys and values of a block."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.model.layers[index].self_attn
    found = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    return [getattr(one, "base_layer", one).weight for one in found]


def are_joined(model: Any, index: int = 1) -> bool:
    return len({p.untyped_storage().data_ptr() for p in parts(model, index)}) == 1


def has_nothing_left(model: Any) -> bool:
    """Every weight fills a memory of its own."""
    weights = list({id(p): p for p in model.parameters()}.values())
    assert len({p.untyped_storage().data_ptr() for p in weights}) == len(weights)
    return all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in weights)


def test_the_parameters_are_the_same_objects_with_the_same_values() -> None:
    model = llama(lora=True)
    before, objects = fingerprints(model), dict(model.named_parameters())
    held = sum(p.numel() for p in model.parameters())
    with inner_mode(model):
        attacked(model)
        assert are_joined(model)
        assert fingerprints(model) == before
        memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        rows = 16 * len(model.base_model.model.model.layers) * (3 * 32 + 48)  # of LoRA's first factors, four a block
        assert sum(memory.values()) <= 4 * (held + 2 * rows)  # no second copy of the weights
    assert has_nothing_left(model)
    assert fingerprints(model) == before
    assert all(p is objects[name] for name, p in model.named_parameters())


def test_a_second_attack_in_the_mode_moves_nothing() -> None:
    model = llama(lora=True)
    with inner_mode(model):
        attacked(model)
        places = [p.data_ptr() for p in model.parameters()]
        attacked(model)
        assert [p.data_ptr() for p in model.parameters()] == places


def through_transformers(model: Any, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return next(folder.glob("*model.safetensors")).read_bytes()


def through_accelerate(model: Any, folder: Path) -> bytes:
    Accelerator(cpu=True).save_model(model, folder)
    return (folder / "model.safetensors").read_bytes()


def through_safetensors(model: Any, folder: Path) -> bytes:
    folder.mkdir()
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return (folder / "model.safetensors").read_bytes()


def through_pickle(model: Any, folder: Path) -> bytes:
    """As many bytes; each pickle numbers what it holds anew."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return bytes(buffer.tell())


@pytest.mark.parametrize("save", [through_transformers, through_accelerate, through_safetensors, through_pickle])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_what_is_saved_has_the_same_bytes(family: str, save: Callable[[Any, Path], bytes], tmp_path: Path) -> None:
    """What takes weights of one memory for copies of each other finds none."""
    model = with_lora(tiny(family))
    before = save(model, tmp_path / "before")
    attacked(model)
    assert save(model, tmp_path / "after") == before
    base = model.unload()
    attacked(base, "one a weight" if family == "phi3" else "joined")  # phi3's maps are one weight as they are
    assert save(base, tmp_path / "base") == save(tiny(family), tmp_path / "fresh")


def replaced(model: Any) -> None:
    q = parts(model)[0]
    q.data = q.data * 1.5


def written(model: Any) -> None:
    with torch.no_grad():
        parts(model)[1].mul_(1.5)


def another_parameter(model: Any) -> None:
    layer = model.base_model.model.model.layers[1].self_attn.v_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


def loaded(model: Any) -> None:
    model.load_state_dict({name: t * 1.25 if "proj" in name else t for name, t in model.state_dict().items()})


def assigned(model: Any) -> None:
    state = {name: t * 1.25 if "proj" in name else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def given_another_rank(model: Any) -> None:
    """More rows are wanted below the weights than there are."""
    model.add_adapter("wide", with_lora(llama(), r=40).peft_config["default"])
    model.set_adapter("wide")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "wide" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


CHANGES: dict[str, Callable[[Any], None]] = {
    "data replaced": replaced,
    "written in place": written,
    "another parameter": another_parameter,
    "a state loaded": loaded,
    "facts forgotten": forget,
}
CHANGES_BETWEEN = CHANGES | {"a state assigned": assigned, "an adapter of another rank": given_another_rank}


@pytest.mark.parametrize("change", CHANGES_BETWEEN.values(), ids=CHANGES_BETWEEN)
def test_weights_that_change_between_attacks(change: Callable[[Any], None]) -> None:
    model = llama(lora=True)
    attacked(model)
    change(model)
    assert_attacks_right(model)
    assert has_nothing_left(model)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_in_the_mode(change: Callable[[Any], None]) -> None:
    model = llama(lora=True)
    with inner_mode(model):
        attacked(model)
        change(model)
        assert_attacks_right(model)
        assert are_joined(model)
    assert has_nothing_left(model)


def test_copies_and_moves() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    attacked(model)
    twin = copy.deepcopy(model)
    assert fingerprints(twin) == before
    assert_attacks_right(twin)
    model.to(torch.float64).to(torch.float32)
    assert fingerprints(model) == before
    assert_attacks_right(model)


def test_adapters_are_merged_unmerged_and_switched_off() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    for _ in range(2):
        assert_attacks_right(model, merge_adapters=True)
        assert fingerprints(model) == before
        with model.disable_adapter():
            assert_attacks_right(model)
    assert_attacks_right(model)
    model.merge_adapter()
    assert_attacks_right(model)
    model.unmerge_adapter()
    assert_attacks_right(model)
    merged = model.merge_and_unload()
    assert_attacks_right(merged)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_merged_where_they_are(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with captured graphs: the weights stay and their values are put back. DoRA replaces their data."""
    monkeypatch.setattr(modes, "KEPT_ON", {"cpu"})
    model = with_lora(tiny("llama"), use_dora=dora)
    before = fingerprints(model)
    for _ in range(2):
        if not dora:
            assert_attacks_right(model)
        assert_attacks_right(model, merge_adapters=True)
        assert fingerprints(model) == before
        assert has_nothing_left(model)
    with inner_mode(model, merge_adapters=True):  # and in a mode of its own within another
        attacked(model, merge_adapters=True)
        with model.disable_adapter():
            attacked(model)
        attacked(model, merge_adapters=True)
    assert fingerprints(model) == before
    assert has_nothing_left(model)


def test_a_refusal_leaves_weights_where_they_are() -> None:
    model = llama(lora=True)
    places = [p.data_ptr() for p in model.parameters()]
    with inner_mode(model):
        with pytest.raises(RuntimeError, match="neither the embedding nor a block"):
            attack_with(model, pairs(), ["base_model.model.model.layers.1.self_attn.q_proj"], "stack")
        assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kept", [set(), {"cpu"}], ids=["copies are merged", "weights are merged"])
def test_a_mode_with_merged_adapters_within_one_without(dora: bool, kept: set[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(modes, "KEPT_ON", kept)
    model = with_lora(tiny("llama"), use_dora=dora)
    before = fingerprints(model)
    with inner_mode(model):
        with model.disable_adapter():
            attacked(model)
        attacked(model, merge_adapters=True)
    assert has_nothing_left(model)
    assert fingerprints(model) == before


def test_an_error_in_an_attack_parts_the_weights_and_frees_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the error is on its way, and its traceback holds what the attack held."""
    model, memories = llama(lora=True), []
    before = fingerprints(model)

    def fails(model: Any, *args: Any) -> None:
        memories.extend(weakref.ref(group.memory) for group in joined_weights.groups_of(model).values())
        assert are_joined(model)
        raise RuntimeError("of this test")

    monkeypatch.setattr("lpa_kernels.attack.loop.run", fails)
    with pytest.raises(RuntimeError, match="of this test") as error:
        attacked(model)
    assert error.traceback
    assert len(memories) == 16
    assert [memory() for memory in memories] == [None] * 16
    assert has_nothing_left(model)
    assert fingerprints(model) == before


def test_an_interrupt_while_weights_move_parts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama(lora=True), []
    before = fingerprints(model)
    copy_ = Tensor.copy_

    def interrupted(self: Tensor, other: Tensor, *args: Any) -> Tensor:
        calls.append(len(calls))  # not the tensor: nobody else may hold it
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy_(self, other, *args)

    def move(self: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", interrupted)
            own(self)

    own = joined_weights.Group.move
    monkeypatch.setattr(joined_weights.Group, "move", move)
    with pytest.raises(KeyboardInterrupt):
        attacked(model)
    assert has_nothing_left(model)
    assert fingerprints(model) == before
    assert_attacks_right(model)


def test_without_room_for_both_weights_part_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied, calls = llama(lora=True), joined_weights._copy, []
    before = fingerprints(model)

    def full(values: Tensor, device: torch.device) -> Tensor:
        calls.append(device)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("of this test")
        return copied(values, device)

    monkeypatch.setattr(joined_weights, "_copy", full)
    attacked(model)
    assert len(calls) > 3
    assert has_nothing_left(model)
    assert fingerprints(model) == before


def test_an_error_while_weights_part_leaves_the_others_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, calls = llama(lora=True), joined_weights.Group.part, []

    def fails(self: Any) -> None:
        calls.append(self)
        own(self)
        if len(calls) == 2:
            raise RuntimeError("of this test")

    monkeypatch.setattr(joined_weights.Group, "part", fails)
    with pytest.raises(RuntimeError, match="of this test"):
        attacked(model)
    assert len(calls) == 16
    assert has_nothing_left(model)


@pytest.mark.parametrize("full", ["Group.__init__", "Maps._adapters"])
def test_without_memory_for_it_each_map_is_a_product_of_its_own(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any) -> None:
        raise torch.OutOfMemoryError("of this test")

    monkeypatch.setattr(f"lpa_kernels.model.joined.{full}", raises)
    model = llama(lora=True)
    with inner_mode(model):
        assert_attacks_right(model, "0 of 16 joined (there is no memory to join them in)")
        assert not are_joined(model)


def test_what_was_compared_apart_is_not_run_joined() -> None:
    model = llama(lora=True)
    state = model.state_dict()
    assert_attacks_right(model, "0 of 16 joined (a weight's memory is not its own alone)")
    del state
    assert_attacks_right(model, "0 of 16 joined (a weight's memory is not its own alone)")
    forget(model)
    assert_attacks_right(model)


def test_keys_that_are_values() -> None:
    """One parameter twice among the maps of one input."""
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    assert_attacks_right(model, "7 of 8 joined (a weight is two maps' of one input)")


def test_weights_that_are_trained_stay_the_optimisers() -> None:
    """All parameters want gradients outside of attacks; an optimiser writes where they are."""
    model = tiny("llama").requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        with torch.inference_mode():  # which must not make the parameters tensors of inference
            attacked(model)
        assert all(p.requires_grad for p in model.parameters())
        before = fingerprints(model)
        model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert fingerprints(model) != before
        assert_attacks_right(model)


def test_a_model_that_was_attacked_is_let_go_of_with_its_memory() -> None:
    model = llama(lora=True)
    attacked(model)
    gone = weakref.ref(model), weakref.ref(parts(model)[0])
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def flat(model: Any) -> Any:
    """Weights that are parts of somebody's buffer."""
    found = parts(model)
    buffer = torch.cat([p.data.flatten() for p in found])
    for p, part in zip(found, buffer.split([p.numel() for p in found]), strict=True):
        p.data = part.view(p.shape)
    return buffer


def tied(model: Any) -> Any:
    """Two parameters on one memory."""
    first, second = (model.model.layers[i].self_attn.q_proj for i in (1, 2))
    second.weight = nn.Parameter(first.weight.data, requires_grad=False)


def held(model: Any) -> Any:
    return parts(model)[2].data


@pytest.mark.parametrize(("arrange", "count"), [(flat, 7), (tied, 6), (held, 7)])
def test_weights_whose_memory_others_refer_to_are_not_moved(arrange: Callable[[Any], Any], count: int) -> None:
    model = tiny("llama")
    other = arrange(model)
    places = [p.data_ptr() for p in parts(model)]
    with inner_mode(model):
        assert_attacks_right(model, f"{count} of 8 joined (a weight's memory is not its own alone)")
        assert [p.data_ptr() for p in parts(model)] == places
        assert are_joined(model, 0)  # which is not touched
    assert [p.data_ptr() for p in parts(model)] == places
    del other


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_weights_in_two_blocks(lora: bool) -> None:
    """With adapters of their own, as looped models have them."""
    model = llama(lora=lora)
    base = model.get_base_model() if lora else model
    first, second = (base.model.layers[i].self_attn for i in (1, 2))
    for name in ("q_proj", "k_proj", "v_proj"):
        if lora:
            getattr(second, name).base_layer = getattr(first, name).base_layer
        else:
            getattr(second, name).weight = getattr(first, name).weight
    count = 16 if lora else 8
    for _ in range(2):
        assert_attacks_right(model, f"{count - 1} of {count} joined (a weight is in two blocks)")
    assert second.q_proj.weight is first.q_proj.weight


def test_a_cpu_keeps_its_weights_where_they_are() -> None:
    model = tiny("llama")
    with joining(False), inner_mode(model):
        attacked(model, "one a weight")
        assert not are_joined(model)


def test_a_map_that_is_not_joined_leaves_the_second_factor_to_the_op_that_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lpa_kernels.model.linear.WHOLE_ON", set())
    linear, x = a_linear(8, 3, True, seed=1), drawn(5, 6)
    y, low = Maps([linear]).ahead(x)
    assert low is not None
    assert (low[0].shape, low[1] is linear.b) == ((5, 3), True)
    assert close(y + low[0] @ low[1].t(), linear(x))
