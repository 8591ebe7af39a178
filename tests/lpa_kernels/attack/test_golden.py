"""The inner loop gives what the public LAT code gives: the golden vectors, through the public names."""

import pytest
import torch

from lpa_kernels import fused_latent_pgd
from tests.support.golden import load_golden

from ...support.models import DEVICE

CASES = [name for name in load_golden().info["cases"] if name.endswith((".base", ".lora"))]


@pytest.mark.parametrize("device", ["cpu", *([DEVICE] if DEVICE != "cpu" else [])])
@pytest.mark.parametrize("engine", ["reference", "packed", "stack"])
@pytest.mark.parametrize("name", CASES)
def test_inner_loop(name, engine, device):
    golden = load_golden()
    case = dict(golden.info["cases"][name])
    expected = case.pop("losses")
    lora = name.endswith(".lora")
    losses, wrappers = fused_latent_pgd(
        batch={key: value.to(device) for key, value in golden.lat_batch().items()},
        model=golden.model(lora).to(device),
        model_layers_module="base_model.model.model.layers" if lora else "model.layers",
        device=device,
        return_loss_over_time=True,
        engine=engine,
        **case,
    )
    for step, (got, want) in enumerate(zip(losses, expected, strict=True)):
        assert set(got) == set(want)
        for key in want:
            assert got[key] == pytest.approx(want[key], abs=2e-6 if device == "cpu" else 1e-5), (step, key)
    layers = case["layer"] if isinstance(case["layer"], list) else [case["layer"]]
    order = [layer for layer in layers if isinstance(layer, int)] + [x for x in layers if x == "embedding"]
    for layer, wrapper in zip(order, wrappers, strict=True):
        want = golden.tensors[f"delta.{name}.{layer}"]
        assert wrapper.hook_fn.attack.shape == want.shape
        torch.testing.assert_close(
            wrapper.hook_fn.attack.detach().cpu(), want, rtol=0, atol=1e-3 * float(want.abs().max())
        )
