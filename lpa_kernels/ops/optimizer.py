"""pgd_update_ as a torch.optim.Optimizer, for loops that own their perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .functional import norm_named, pgd_update_, rule_named

PASSED = ("epsilon", "rule", "norm", "maximize", "betas", "eps", "weight_decay")  # settings of a group


class PGDOptimizer(torch.optim.Optimizer):
    """Projected gradient descent on ordinary tensors with `.grad`, one pass over each.

    `step()` applies the rule and then projects each row (the last dimension) into the ball of radius epsilon, as
    `torch.optim.AdamW` followed by a clamp of the norms does. Learning-rate schedulers work: the step size is the
    group's `lr`.

    Args:
        params: tensors [..., H], float32 and contiguous.
        lr: step size.
        epsilon: radius of the ball.
        norm, rule, betas, eps, weight_decay, maximize, backend: as in `lpa_kernels.pgd_update_`.

    Raises:
        ValueError: an unknown rule or norm, a negative lr or epsilon, or a parameter that is not contiguous.

    >>> delta = torch.zeros(1, 2, requires_grad=True)
    >>> optimizer = PGDOptimizer([delta], lr=2.0, epsilon=1.0, rule="normalised")
    >>> (delta @ torch.tensor([3.0, 4.0])).sum().backward()
    >>> optimizer.step()
    >>> delta.tolist()
    [[-0.6..., -0.8...]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        epsilon: float = float("inf"),
        norm: str = "l2",
        rule: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        rule, norm = rule_named(rule), norm_named(norm)
        if lr < 0 or epsilon < 0:
            raise ValueError(f"lr={lr} and epsilon={epsilon} must not be negative")
        defaults = {"lr": lr, "epsilon": epsilon, "norm": norm, "rule": rule, "betas": betas, "eps": eps,
                    "weight_decay": weight_decay, "maximize": maximize}  # fmt: skip
        super().__init__(params, defaults)
        self.backend = backend
        for group in self.param_groups:
            for p in group["params"]:
                if not p.is_contiguous() or p.dim() == 0:
                    raise ValueError(f"a parameter of shape {tuple(p.shape)} is not a contiguous tensor [..., H]")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        flat = p.detach().view(1, -1, p.shape[-1])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            if group["rule"] in ("adamw", "adam", "rmsprop"):
                state["exp_avg"] = torch.zeros_like(flat)
                state["exp_avg_sq"] = torch.zeros_like(flat)
        state["step"] += 1
        assert p.grad is not None
        settings = {key: value for key, value in group.items() if key in PASSED}
        pgd_update_(
            flat,
            [p.grad.reshape(flat.shape[1:])],
            torch.arange(flat.shape[1], device=p.device)[:, None],
            **state,
            step_size=group["lr"],
            **settings,
            backend=self.backend,
        )
