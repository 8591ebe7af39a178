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

from lpa_kernels.model import modes
from lpa_kernels.model.facts import forget
from lpa_kernels.model.joined import Maps
from lpa_kernels.model.linear import Linear
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


def a_linear(out: int, rank: int, bias: bool, seed: int) -> tuple[nn.Module, Linear]:
    """A module of 6 inputs with an adapter of this rank (0 for none), and what is read from it."""
    module = nn.Linear(6, out, bias=bias, dtype=torch.float64).requires_grad_(False)
    if not rank:
        return module, Linear(module.weight, module.bias)
    return module, Linear(module.weight, module.bias, drawn(rank, 6, seed=seed), drawn(out, rank, seed=seed + 1), 0.7)


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
    modules, linears = zip(*(a_linear(*each, seed=10 * i) for i, each in enumerate(case)), strict=True)
    x, widths = drawn(5, 6, seed=99), [out for out, *_ in case]
    wanted = [one(x) for one in linears]
    grads = [drawn(5, out, seed=50 + i) for i, out in enumerate(widths)]
    below = sum(one.back(grad) for one, grad in zip(linears, grads, strict=True))
    maps = Maps(modules, linears)
    maps.join()
    assert isinstance(below, Tensor)
    assert maps.joined is not None
    assert maps.sizes == widths
    y = maps(x)
    assert isinstance(y, Tensor)
    assert all(close(*both) for both in zip(maps.parts(y), wanted, strict=True))
    room = maps.room(y)
    assert isinstance(room, Tensor)
    room.fill_(float("nan"))  # nothing that was not written may count
    assert close(maps.back(maps.filled(room, tuple(grads))), below)
    assert close(maps.back(torch.cat(grads, 1)), below)
    if len(case) == 1:
        base, low = maps.ahead(x)
        assert close(base if low is None else base + low[0] @ low[1].t(), wanted[0])


def test_maps_that_a_module_holds_as_one_weight() -> None:
    (module, linear), x = a_linear(9, 2, True, seed=3), drawn(5, 6)
    apart = Maps([module], [linear], [4, 5])
    wanted, grad = torch.cat(apart.parts(apart(x)), 1), drawn(5, 9, seed=1)
    below = apart.back(grad.split([4, 5], 1))
    del apart  # its views refer to the weight's memory
    maps = Maps([module], [linear], [4, 5])
    maps.join()
    assert maps.joined is not None
    assert close(torch.cat(maps.parts(maps(x)), 1), wanted)
    assert close(maps.back(grad), below)
    assert close(torch.cat([one(x) for one in maps.each], 1), wanted)


# ---- the model's weights ---------------------------------------------------------------------------------------------


def fingerprints(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of the parameters, without a look at the state, which would give them memory of their own."""
    return {
        name: (tuple(t.shape), hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest())
        for name, t in model.named_parameters()
    }


def attacked(model: Any) -> Any:
    return attack_with(model, pairs(), ["embedding", "mlp:1"], "stack", **DESCENT)


def assert_attacks_right(model: Any) -> None:
    """The next attack is that of plain passes, which read the parameters."""
    want = attack_with(model, pairs(), ["embedding", "mlp:1"], "reference", **DESCENT)
    assert_same(attacked(model), want, losses=1e-5)


def parts(model: Any, index: int = 1) -> list[nn.Parameter]:
    """Weights of queries, keys and values of a block."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.model.layers[index].self_attn
    found = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    return [getattr(one, "base_layer", one).weight for one in found]


def are_joined(model: Any, index: int = 1) -> bool:
    return len({p.untyped_storage().data_ptr() for p in parts(model, index)}) == 1


def test_the_parameters_are_the_same_objects_with_the_same_values() -> None:
    model = llama(lora=True)
    before, objects = fingerprints(model), dict(model.named_parameters())
    held = sum(p.numel() for p in model.parameters())
    attacked(model)
    assert are_joined(model)
    assert fingerprints(model) == before
    assert all(p is objects[name] for name, p in model.named_parameters())
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    rows = 16 * len(model.base_model.model.model.layers) * (3 * 32 + 48)  # of LoRA's first factors, four a block
    assert sum(memory.values()) <= 4 * (held + 2 * rows)  # no second copy of the weights


def test_a_second_attack_moves_nothing() -> None:
    model = llama(lora=True)
    attacked(model)
    places = [p.data_ptr() for p in model.parameters()]
    attacked(model)
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_has_the_same_bytes(family: str, lora: bool, tmp_path: Path) -> None:
    """With adapters there is room below the weights, in the same memory."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "before")
    adapted = with_lora(model) if lora else model
    attacked(adapted)
    if lora:
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.unload()
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    assert safetensors.torch.save(model.state_dict()) == safetensors.torch.save(tiny(family).state_dict())
    assert fingerprints(type(model).from_pretrained(tmp_path / "after")) == fingerprints(tiny(family))


def test_the_state_of_a_model_is_weights_that_share_no_memory() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    for keep_vars in (False, True):
        attacked(model)
        assert are_joined(model)
        state = model.state_dict(keep_vars=keep_vars)
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())
        assert all(state[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
        assert fingerprints(model) == before
        attacked(model)
        assert are_joined(model) == keep_vars  # of tensors that somebody holds none is moved; parameters follow
        del state
    one = model.base_model.model.model.layers[1].self_attn
    assert_attacks_right(model)
    one.state_dict()
    assert not are_joined(model)
    assert are_joined(model, 0)  # whose state nobody asked for


def through_accelerate(model: Any, folder: Path) -> Path:
    Accelerator(cpu=True).save_model(model, folder)
    return folder / "model.safetensors"


def through_safetensors(model: Any, folder: Path) -> Path:
    folder.mkdir()
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return folder / "model.safetensors"


@pytest.mark.parametrize("save", [through_accelerate, through_safetensors])
def test_what_takes_weights_of_one_memory_for_copies_saves_all(
    save: Callable[[Any, Path], Path], tmp_path: Path
) -> None:
    model = llama(lora=True)
    before = save(model, tmp_path / "before").read_bytes()
    attacked(model)
    assert are_joined(model)
    assert save(model, tmp_path / "after").read_bytes() == before
    assert_attacks_right(model)
    assert are_joined(model)


def test_a_pickled_model_needs_nothing_of_this_package() -> None:
    model = tiny("llama")
    before = fingerprints(model)
    attacked(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"lpa_kernels" not in buffer.getvalue()
    buffer.seek(0)
    fresh = torch.load(buffer, weights_only=False)
    assert fingerprints(fresh) == before
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert_attacks_right(fresh)
    assert are_joined(fresh)


def test_joined_weights_are_copied_and_moved() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    attacked(model)
    twin = copy.deepcopy(model)
    assert fingerprints(twin) == before
    assert not are_joined(twin)
    assert_attacks_right(twin)
    assert are_joined(twin)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    model.to(torch.float64).to(torch.float32)
    assert not are_joined(model)
    assert fingerprints(model) == before
    assert_attacks_right(model)
    assert are_joined(model)


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
    "an adapter of another rank": given_another_rank,
    "facts forgotten": forget,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_between_attacks(change: Callable[[Any], None]) -> None:
    model = llama(lora=True)
    attacked(model)
    change(model)
    assert_attacks_right(model)
    assert are_joined(model)


def test_adapters_are_merged_unmerged_and_switched_off() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    attacked(model)
    for _ in range(2):
        found = attack_with(model, pairs(), ["embedding"], "stack", merge_adapters=True, **DESCENT)
        want = attack_with(model, pairs(), ["embedding"], "reference", **DESCENT)
        assert_same(found, want, losses=1e-5)
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


def test_weights_that_are_merged_where_they_are_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with captured graphs, where the weights stay and their values are put back."""
    monkeypatch.setattr(modes, "KEPT_ON", {"cpu"})
    model = llama(lora=True)
    before = fingerprints(model)
    places = []
    for _ in range(2):
        found = attack_with(model, pairs(), ["embedding"], "stack", merge_adapters=True, **DESCENT)
        assert found.kernels["products"] == "joined"
        assert_same(found, attack_with(model, pairs(), ["embedding"], "reference", **DESCENT), losses=1e-5)
        assert fingerprints(model) == before
        places.append([p.data_ptr() for p in model.parameters()])
    assert places[0] == places[1]
    assert_attacks_right(model)


def test_an_adapter_comes_and_goes_around_joined_weights() -> None:
    """What is known of the memory is known of the modules that hold the weights, not of the adapters around them."""
    base = tiny("llama")
    attacked(base)
    places = [p.data_ptr() for p in parts(base)]
    assert are_joined(base)
    model = with_lora(base)
    assert [p.data_ptr() for p in parts(model)] == places
    assert_attacks_right(model)
    assert are_joined(model)  # in larger memory, with room for the adapter
    base = model.unload()
    assert are_joined(base)
    assert_attacks_right(base)
    forget(base)
    assert not are_joined(base)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in base.parameters())
    assert not any(module._state_dict_pre_hooks for module in base.modules())


def test_a_refusal_leaves_weights_where_they_are() -> None:
    model = llama(lora=True)
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="neither the embedding nor a block"):
        attack_with(model, pairs(), ["base_model.model.model.layers.1.self_attn.q_proj"], "stack")
    assert [p.data_ptr() for p in model.parameters()] == places


def test_weights_that_are_trained_stay_the_optimisers() -> None:
    """All parameters want gradients outside of attacks; an optimiser writes where they are."""
    model = tiny("llama").requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        attacked(model)
        assert are_joined(model)
        assert all(p.requires_grad for p in model.parameters())
        before = fingerprints(model)
        model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert fingerprints(model) != before
        assert_attacks_right(model)


def test_forget_gives_weights_their_own_memory() -> None:
    model = llama(lora=True)
    before = fingerprints(model)
    attacked(model)
    forget(model)
    assert not are_joined(model)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters())
    assert not any(module._state_dict_pre_hooks for module in model.modules())
    assert fingerprints(model) == before


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


@pytest.mark.parametrize("arrange", [flat, tied, held])
def test_weights_whose_memory_others_refer_to_are_not_moved(arrange: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    other = arrange(model)
    places = [p.data_ptr() for p in parts(model)]
    assert_attacks_right(model)
    assert [p.data_ptr() for p in parts(model)] == places
    assert are_joined(model, 0)  # which is not touched
    del other


def test_the_same_weights_in_two_blocks() -> None:
    model = tiny("llama")
    first, second = (model.model.layers[i].self_attn for i in (1, 2))
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    for _ in range(2):
        assert_attacks_right(model)
    assert second.q_proj.weight is first.q_proj.weight


def test_a_cpu_keeps_its_weights_where_they_are() -> None:
    model = tiny("llama")
    with joining(False):
        attacked(model)
    assert not are_joined(model)


def test_explain_tells_what_is_one_product() -> None:
    model = tiny("llama")
    assert attacked(model).kernels["products"] == "joined"
    flat(model)
    assert attacked(model).kernels["products"] == "15 of 16 joined (the memory of the rest is not theirs alone)"
    with joining(False):
        assert attacked(model).kernels["products"] == "one a weight"


def test_a_map_that_is_not_joined_leaves_the_second_factor_to_the_op_that_reads_it() -> None:
    weight, a, b = (torch.empty(*shape, device="meta") for shape in ((6, 4), (2, 4), (6, 2)))
    y, low = Maps([nn.Identity()], [Linear(weight, None, a, b, 0.5)]).ahead(torch.empty(3, 4, device="meta"))
    assert low is not None
    assert (y.shape, low[0].shape, low[1]) == ((3, 6), (3, 2), b)
