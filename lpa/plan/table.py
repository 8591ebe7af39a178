"""A plan as people read it: memory by part, floating-point work, and what was assumed."""

from __future__ import annotations

from .dry_run import PARTS, Estimate

LABELS = {"weights": "loaded", "attack": "in the attack", "defence": "in an update"}


def memory_rows(found: Estimate) -> list[tuple[str, list[str]]]:
    """(part, GB in each phase), the sum last; parts that take nothing anywhere are left out."""
    phases = list(found.phases.values())
    rows = []
    for part in PARTS:
        if any(phase[part] for phase in phases):
            rows.append((part, [gigabytes(phase[part]) for phase in phases]))
    return [*rows, ("all", [gigabytes(phase.total()) for phase in phases])]


def gigabytes(size: float) -> str:
    """GB (10^9 bytes) with three digits after the point below 10, else one."""
    return f"{size / 1e9:.3f}" if size < 1e10 else f"{size / 1e9:.1f}"


def as_text(found: Estimate) -> str:
    """The memory table and the work, for a terminal."""
    lines = [f"{'GB (10^9 bytes)':16}" + "".join(f"{LABELS[name]:>15}" for name in found.phases)]
    lines += [f"{part:16}" + "".join(f"{value:>15}" for value in values) for part, values in memory_rows(found)]
    total = found.attack_flops + found.defence_flops
    share = found.attack_flops / total if total else 0.0
    lines += [
        "",
        f"expected peak: {gigabytes(found.peak.total())} GB, {LABELS[found.peak_phase]}",
        f"floating-point work: {total:.2e} operations, {share:.0%} of them in attacks",
        f"weights: {found.total / 1e6:,.1f}M, trained: {found.trained / 1e6:,.1f}M; "
        f"a pass: {found.rows} rows, {found.tokens} tokens",
    ]
    return "\n".join(lines)


ASSUMPTIONS = """\
Assumed: every row is as long as said; one pass for both completions where attention is eager or sdpa; fused attention
for sdpa; the plain PyTorch ops (those for GPUs keep fewer copies of the logits); no part of the model run once for all
inner steps; AdamW.
Of the packed engine; a frozen stack ("auto" takes one on a CPU where it can) keeps less in the attack.
Of one rank; FSDP2's units are those that accelerate makes, and a block's weights come while another one is in use.
Not in it: what NCCL or gloo keep for themselves; what Python, libraries and a GPU's driver take; what an allocator
keeps beyond the tensors (with glibc's defaults much, docs/scale.md); loading; measuring before and after.
No GPU was measured."""
