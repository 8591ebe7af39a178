"""patch_latent_at lets a trainer of the public kind run on the fused loop, and leaves its code as it found it."""

import importlib
import inspect
import sys
import types

import pytest
import torch

from lpa_kernels.compat import fused_latent_pgd, patch_latent_at
from tests.support import foreign
from tests.support.foreign import trainer, wrappers
from tests.support.lat_setting import LAYERS, call, lat_batch, small_model

PACKAGE = "tests.support.foreign"


def state():
    """Every object of the foreign package by module and name."""
    return {(m.__name__, k): id(v) for m in (foreign, trainer, wrappers) for k, v in vars(m).items()}


def run(patch=None, lora=True, batches=1, prompt_mask=True, model=None, **settings):
    model = model or small_model(lora)
    seen = trainer.Trainer(model, LAYERS[lora], **settings)
    for seed in range(batches):
        seen.step(lat_batch(8, seed, prompt_mask))
    if patch is not None:
        patch.undo()
    return seen


def apart(ours, theirs):
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours.trained, theirs.trained, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"batches": 2},
        {"batches": 2, "lora": False},
        {"coefs": {"dpo": 1.0}},
        {"prompt_mask": False, "layer": [2], "lora": False},
    ],
    ids=str,
)
def test_trained_weights_are_the_same(settings):
    theirs, ours = run(**settings), run(patch_latent_at(PACKAGE), **settings)
    assert apart(ours, theirs) < 1e-4
    start = next(p for p in small_model(settings.get("lora", True)).parameters() if p.requires_grad)
    assert not torch.equal(theirs.trained[0], start)
    for got, want in zip(ours.losses, theirs.losses, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert ours.calls == theirs.calls


def test_every_micro_batch_is_attacked():
    """8 examples by 2: 3 sites in 2 passes make 6 perturbed module calls a micro-batch."""
    theirs, ours = run(size=2), run(patch_latent_at(PACKAGE), size=2)
    assert theirs.calls == [0, 0, 0, 6] * 2
    assert ours.calls == [6, 6, 6, 6] * 2
    upstream = run(patch_latent_at(PACKAGE, accumulation="upstream"), size=2)
    assert upstream.calls == theirs.calls
    assert apart(upstream, theirs) < 1e-4 < apart(ours, theirs)


def test_micro_batches_train_as_the_whole_batch_does():
    """Gradients of micro-batches add up, so half the mean loss each gives the whole batch's update."""
    whole, parts = (run(patch_latent_at(PACKAGE), size=size, updates=1) for size in (None, 4))
    # Adam's update does not depend on the gradient's scale
    assert apart(parts, whole) < 2e-5


@pytest.mark.parametrize("size", [None, 2])
def test_foreign_clear_hooks_leaves_no_attack_behind(monkeypatch, caplog, size):
    """A user who takes over the inner loop alone, and keeps the code's own clear_hooks."""
    monkeypatch.setattr(trainer, "projected_gradient_descent", fused_latent_pgd)
    model, batch = small_model(), lat_batch(8)
    seen = run(model=model, size=size)
    assert set(seen.calls) == {6}
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        after = model(input_ids=batch["adv_tokens"]).logits
        plain = small_model()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(after, plain(input_ids=batch["adv_tokens"]).logits)
    told = [m for m in caplog.messages if f"{PACKAGE}.trainer.clear_hooks does not know" in m]
    assert len(told) == 1


def test_patch_replaces_what_the_trainer_finds_and_undo_restores_it():
    before = state()
    own = trainer.projected_gradient_descent
    script = types.ModuleType("a_users_script")
    script.attack = own  # from package import projected_gradient_descent as attack
    sys.modules[script.__name__] = script
    try:
        patch = patch_latent_at(PACKAGE)
        assert f"{PACKAGE}.trainer.projected_gradient_descent" in patch.places
        assert trainer.projected_gradient_descent is script.attack is foreign.projected_gradient_descent is not own
        assert inspect.signature(script.attack) == inspect.signature(own)
        late = script.late = script.attack
        patch.undo()
        assert script.attack is script.late is own is not late
        patch.undo()
        assert state() == before
    finally:
        del sys.modules[script.__name__]


def test_a_module_is_enough_and_its_home_is_searched():
    before = state()
    user = types.ModuleType("a_module_of_a_user")
    user.projected_gradient_descent = trainer.projected_gradient_descent
    with patch_latent_at(user):
        assert trainer.clear_hooks is wrappers.clear_hooks
        assert id(wrappers.clear_hooks) != before[wrappers.__name__, "clear_hooks"]
        assert user.projected_gradient_descent is trainer.projected_gradient_descent
    assert user.projected_gradient_descent is trainer.projected_gradient_descent
    assert state() == before


def test_patched_clear_hooks_knows_both_kinds():
    model, batch = small_model(), lat_batch()
    names = list(model.state_dict())
    with patch_latent_at(PACKAGE):
        _, kept = call(trainer.projected_gradient_descent, batch, model)
        theirs = wrappers.GDAdversary(32, 1.0, batch["prompt_mask"])
        wrappers.wrap(model, LAYERS[True] + ".2", "mlp", theirs)
        trainer.clear_hooks(model)
    assert kept
    assert list(model.state_dict()) == names
    assert not any(m._forward_hooks for m in model.modules())


def test_undo_takes_its_attacks_off_even_after_an_exception():
    model, batch, before = small_model(), lat_batch(), state()
    with torch.no_grad():
        clean = model(input_ids=batch["adv_tokens"]).logits
    with pytest.raises(RuntimeError, match="in the middle"), patch_latent_at(PACKAGE):  # noqa: PT012
        _, kept = call(trainer.projected_gradient_descent, batch, model)
        raise RuntimeError("in the middle")
    assert state() == before
    assert kept[0].enabled
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch["adv_tokens"]).logits, clean)


def test_a_second_patch_is_refused():
    before = state()
    with patch_latent_at(PACKAGE):
        once = state()
        with pytest.raises(RuntimeError, match=r"patched already; call \.undo\(\)"):
            patch_latent_at(PACKAGE)
        with pytest.raises(RuntimeError, match="patched already"):
            patch_latent_at(trainer)
        assert state() == once
    assert state() == before


def test_unknown_packages_and_options():
    with pytest.raises(ImportError, match="cannot patch 'no_such_package'"):
        patch_latent_at("no_such_package")
    with pytest.raises(ImportError, match="cannot patch 'latent_at'"):
        patch_latent_at()
    with pytest.raises(ValueError, match="json has no projected_gradient_descent"):
        patch_latent_at("json")
    with pytest.raises(TypeError, match="42"):
        patch_latent_at(42)
    before = state()
    with pytest.raises(TypeError, match="no option 'epsilon'; the options are engine"):
        patch_latent_at(PACKAGE, epsilon=3)
    assert state() == before


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("projected_gradient_descent", lambda batch, model, radius: None, "unknown parameters .'radius'"),
        ("projected_gradient_descent", lambda batch, model, **rest: None, r"\*\*rest"),
        ("clear_hooks", lambda model, verbose=False: None, "verbose"),
        ("GDAdversary", type("GDAdversary", (), {"__init__": lambda self, dim, sigma: None}), "sigma"),
    ],
)
def test_other_versions_are_refused_untouched(monkeypatch, name, other, message):
    module = types.ModuleType("another_version")
    for key in ("projected_gradient_descent", "clear_hooks", "GDAdversary"):
        setattr(module, key, getattr(foreign, key))
    setattr(module, name, other)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before, own = state(), dict(vars(module))
    with pytest.raises(ValueError, match=message):
        patch_latent_at("another_version")
    assert state() == before
    assert dict(vars(module)) == own


def test_a_forks_own_defaults_and_order_hold(monkeypatch):
    fork = types.ModuleType("a_fork")

    def projected_gradient_descent(
        model, batch, layer, model_layers_module, epsilon, learning_rate, loss_coefs, pgd_iterations=3, device="cpu"
    ):
        raise AssertionError("replaced")

    fork.projected_gradient_descent, fork.clear_hooks = projected_gradient_descent, lambda model: None
    monkeypatch.setitem(sys.modules, "a_fork", fork)
    seen = []
    with patch_latent_at("a_fork", engine="reference"):
        coefs = {"toward": 1, "away": 1}
        seen.append(fork.projected_gradient_descent(small_model(), lat_batch(), 1, LAYERS[True], 1.0, 0.05, coefs))
    expected = call(fused_latent_pgd, lat_batch(), small_model(), layer=1, pgd_iterations=3, loss_coefs=coefs)
    assert seen[0][0] == pytest.approx(expected[0][-1], abs=1e-6)
    assert fork.projected_gradient_descent is projected_gradient_descent


def test_a_package_that_imports_nothing_has_its_methods_imported(tmp_path, monkeypatch):
    (tmp_path / "bare_fork").mkdir()
    (tmp_path / "bare_fork" / "__init__.py").touch()
    (tmp_path / "bare_fork" / "lat_methods.py").write_text(f"from {PACKAGE}.trainer import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = trainer.projected_gradient_descent
    with patch_latent_at("bare_fork") as patch:
        assert trainer.projected_gradient_descent is not own
        assert "bare_fork.lat_methods.projected_gradient_descent" in patch.places
    assert trainer.projected_gradient_descent is own
    (tmp_path / "bare_fork" / "lat_methods.py").write_text("import no_such_logger\n")
    for name in ("bare_fork", "bare_fork.lat_methods"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"bare_fork\.lat_methods.*no_such_logger"):
        patch_latent_at("bare_fork")


def test_the_package_may_be_imported_by_the_patch(tmp_path, monkeypatch):
    (tmp_path / "clone_of_mine").mkdir()
    (tmp_path / "clone_of_mine" / "__init__.py").write_text(
        f"from {PACKAGE} import *\nfrom {PACKAGE} import clear_hooks\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = state()
    with patch_latent_at("clone_of_mine"):
        module = importlib.import_module("clone_of_mine")
        assert module.projected_gradient_descent is trainer.projected_gradient_descent
        assert state() != before
    assert state() == before
