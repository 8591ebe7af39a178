"""The pieces of `python -m benchmarks.gpu`, in the order in which they matter: each a few minutes, a table of cases."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product as pairings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import measures, preference
from benchmarks.gpu.measures import Found, Skip, attack_time, synchronized, where_time_goes
from benchmarks.gpu.shapes import BATCH, CONFIGS, STEPS, TINY, counted, products, shape
from benchmarks.loop_cases import Shape, base_model, batch_of, conventional, forget_model, model_of, ours
from benchmarks.measure import ROOT, copy_bandwidth, device, scale_bandwidth
from benchmarks.op_cases import ALL, GPU, Case, all_cases, packed_mask, packed_places
from benchmarks.op_cases import TINY as TINY_OPS
from lpa_kernels import LatentPGD
from lpa_kernels.model import decoder_layers, resolve_sites

Cases = dict[str, Callable[[], Found]]
PIECES: dict[str, Callable[[bool], Cases]] = {}  # by name, from whether the run is dry, the cases to run in order


def piece(name: str, *arguments: Any) -> Callable[[Callable[..., Cases]], Callable[..., Cases]]:
    """Enter a function as a piece; `arguments` come after `dry`."""

    def enter(function: Callable[..., Cases]) -> Callable[..., Cases]:
        PIECES[name] = lambda dry: function(dry, *arguments)
        return function

    return enter


# ---- truth -----------------------------------------------------------------------------------------------------------


@piece("truth")
def truth(dry: bool) -> Cases:
    """What the machine is, its ceilings, and what attention does with our masks."""
    elements = 1 << 20 if dry else 1 << 28  # of float32: a GiB, many times any L2
    cases: Cases = {
        "machine": measures.machine,
        "copy": lambda: {"GB/s": copy_bandwidth(elements) / 1e9, "scale GB/s": scale_bandwidth(elements) / 1e9},
        "launch": measures.launch,
        "large product": lambda: measures.sustained(128 if dry else 8192, 2 if dry else 100),
    }
    for family, rows in pairings(CONFIGS, (8,) if dry else (288, 1152, 2304)):  # micro-batches of 2, 8, 16
        cases[f"products, {family}, {rows} rows"] = partial(rates, family, rows, dry)
    mask = packed_mask(packed_places(1))
    heads, width = (2, 16) if dry else (32, 128)
    for pairs in (2,) if dry else (2, 16):
        cases[f"sdpa, {pairs} pairs, torch's choice"] = partial(measures.attended, mask, pairs, heads, width, None)
        for backend in sdpa_backends():
            run = partial(measures.attended, mask, pairs, heads, width, backend)
            cases[f"sdpa, {pairs} pairs, {backend.name}"] = run
    # rows of 64, logsumexps below -88.7: cuDNN's backward pass may give NaN (pytorch 196678)
    short = packed_mask(packed_places(1, 50))
    for backend in sdpa_backends():
        cases[f"NaN, {backend.name}"] = partial(measures.attended, short, 2, heads, 64, backend, -120.0)
    cases["NaN, the attack's guard"] = guard
    return cases


def sdpa_backends() -> list[SDPBackend]:
    """Those that take a mask on this device."""
    names = ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH") if device() == "cuda" else ("MATH",)
    return [getattr(SDPBackend, name) for name in names]


def rates(family: str, rows: int, dry: bool) -> Found:
    """A block's four products and their gradients, each and all together."""
    found = {name: measures.product(rows, *sizes, 2 if dry else 15) for name, sizes in products(family, dry).items()}
    spent = sum(p["forward us"] + p["gradient us"] for p in found.values()) * 1e-6
    return {"TFLOP/s": sum(p["FLOP"] for p in found.values()) / spent / 1e12, **found}


def guard() -> Found:
    """An attack on a model whose logsumexps are below -88.7, by cuDNN where it is: is a NaN gradient raised?"""
    config = TINY | {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
                     "max_position_embeddings": 256}  # fmt: skip
    own = Shape("guard", config, ("embedding",), 2, 50, 6, 8, torch.bfloat16)
    model: Any = model_of(own)
    for layer in decoder_layers(model):
        q, k = (getattr(layer.self_attn, f"{name}_proj").base_layer for name in "qk")
        q.weight.data.mul_(16)
        k.weight.data.copy_(-q.weight)  # the first token sees itself alone, and the rotation cancels
    backend, options = sdpa_backends()[0], {"steps": 2, "engine": "packed", "capture_graph": False}
    with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
        try:
            attack = LatentPGD(model, own.sites, **options).attack(batch_of(own))  # type: ignore[arg-type]
        except (FloatingPointError, RuntimeError) as error:  # by the count of gradients, or by a probe before
            return {"backend": backend.name, "outcome": f"raised: {error}"}
        finally:
            forget_model()
    finite = all(bool(delta.isfinite().all()) for delta in attack.deltas.values())
    return {"backend": backend.name, "outcome": "no gradient was NaN" if finite else "NaN went unseen"}


# ---- tests -----------------------------------------------------------------------------------------------------------


@piece("tests-ops", "lpa_kernels/ops", "test_reference.py")
@piece("tests-attack", "lpa_kernels/attack", "test_objective.py")
@piece("tests-model", "lpa_kernels/model", "test_sites.py")
def tests(dry: bool, folder: str, quick: str) -> Cases:
    """The tests of a folder with the GPU, a case a file."""
    files = sorted((ROOT / "tests" / folder).glob(quick if dry else "test_*.py"))
    return {str(file.relative_to(ROOT)): partial(measures.tests, str(file)) for file in files}


@piece("sanitizer")
def sanitizer(dry: bool) -> Cases:
    """compute-sanitizer over the small cases of every op."""
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    return {"plain": measures.small_ops} | {tool: partial(measures.sanitized, tool) for tool in tools}


# ---- ops -------------------------------------------------------------------------------------------------------------


@piece("ops")
def ops(dry: bool) -> Cases:
    """Every op beside torch.compile, Liger and torch's own: microseconds, GB/s, share of the copy, launches."""
    cases = [c for c in all_cases(TINY_OPS) if "compile" not in c.name] if dry else all_cases(GPU) + all_cases(ALL)
    groups = dict.fromkeys(case.group for case in cases)
    return {name: partial(op_group, [case for case in cases if case.group == name], dry) for name in groups}


def op_group(cases: list[Case], dry: bool) -> Found:
    """One group of ways; a GPU's replayed in a graph too, where the way does not wait for the host."""
    from benchmarks.record_ops import measure

    torch._dynamo.reset()  # or a compiled function would take this group's shapes for dynamic ones
    found = measure(cases, 1 if dry else 15, copy_bandwidth(1 << 20) if dry else None)
    if device() == "cuda":
        beyond = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        for case in cases:
            row, run = found[case.name], case.make()
            row |= {"launches": measures.launches(run), "beyond_l2": case.moved > beyond}
            if case.name.startswith("ours") and case.moved:
                row["replayed us"] = round(measures.replayed(run, 20), 2)
    return found


# ---- the inner step --------------------------------------------------------------------------------------------------


@contextmanager
def compiled_blocks(model: nn.Module, own: Shape, dry: bool) -> Iterator[None]:
    """Within it, the forwards of decoder blocks are compiled; those of a block with a site inside child by child.

    Hooks on a module run outside of its compiled forward.
    """
    layers = list(decoder_layers(model))
    hooked = {site.layer for site in resolve_sites(model, own.sites)} | {len(layers) - 1}
    parts = [part for i, layer in enumerate(layers) for part in (layer.children() if i in hooked else [layer])]
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 4 * len(parts)
    try:
        for part in parts:
            part.__dict__["forward"] = torch.compile(
                part.forward, backend="aot_eager" if dry else "inductor", dynamic=False
            )
        yield
    finally:
        for part in parts:
            part.__dict__.pop("forward", None)
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()


PUBLIC = "public form"
WAYS: dict[str, dict[str, Any]] = {  # options of LatentPGD
    "stack": {"engine": "stack", "capture_graph": False},
    "packed": {"engine": "packed", "capture_graph": False},
    "packed, captured": {"engine": "packed", "capture_graph": True},
    "packed, merged, captured": {"engine": "packed", "capture_graph": True, "merge_adapters": True},
    "stack, merged": {"engine": "stack", "capture_graph": False, "merge_adapters": True},
    "stack, captured": {"engine": "stack", "capture_graph": "auto"},  # the column "captured" says whether it was
    "reference": {"engine": "reference"},
    "reference, compiled": {"engine": "reference"},
}


def inner(dry: bool, family: str, pairs: int) -> Cases:
    """One attack of 16 steps by the public form, by each engine, captured, compiled; where the time goes."""
    own, rounds = shape(family, pairs, dry), 1 if dry else 3

    def public() -> Found:
        half, steps = torch.float16 if device() == "cuda" else torch.bfloat16, 2 if dry else 4
        return attack_time(lambda: conventional(own, steps, half), own, steps, rounds)

    def way(name: str) -> Found:
        if WAYS[name].get("capture_graph") and device() != "cuda":
            raise Skip("CUDA graphs need a GPU")
        around = compiled_blocks(model_of(own), own, dry) if "compiled" in name else nullcontext()
        with around:
            return attack_time(lambda: ours(own, STEPS, **WAYS[name]), own, STEPS, rounds)

    def profile(name: str) -> Found:
        if WAYS[name].get("capture_graph") and device() != "cuda":
            raise Skip("CUDA graphs need a GPU")
        return where_time_goes(ours(own, STEPS, **WAYS[name]), STEPS)

    # what the goals are made of comes first
    cases: Cases = {"work": lambda: counted(family, pairs, dry), PUBLIC: public}
    cases |= {name: partial(way, name) for name in WAYS if not dry or "compiled" not in name or family == "llama"}
    return cases | {f"profile of {name}": partial(profile, name) for name in ("stack", "packed", "packed, captured")}


for _family, _pairs in (("llama", 16), ("llama", 2), ("llama", 8), ("qwen3", 16), ("qwen3", 2), ("qwen3", 8)):
    piece(f"inner-{_family}-{_pairs}", _family, _pairs)(inner)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def train(own: Shape, lpa_steps: int, **settings: Any) -> Found:
    """A run of so many LPA steps of 16 pairs in micro-batches of the shape's: seconds, and memory."""
    from datasets import Dataset

    from lpa import LPAConfig, LPATrainer

    forget_model()
    measures.fresh()
    held = {name: value.cpu() for name, value in vars(batch_of(own)).items() if value is not None}

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {name: value.clone() for name, value in held.items()}

    with tempfile.TemporaryDirectory() as folder:
        args = LPAConfig(
            folder, lpa_steps=lpa_steps, per_device_train_batch_size=own.pairs, save_strategy="no",
            gradient_accumulation_steps=BATCH // own.pairs, disable_tqdm=True, report_to=[],
            use_cpu=device() == "cpu", attack_sites=list(own.sites), auto_micro_batch=False, **settings,
        )  # fmt: skip
        data = Dataset.from_dict({"number": list(range(BATCH * 2))})
        trainer = LPATrainer(base_model(own), args, data, None, data_collator=collate)
        begin = synchronized()
        trainer.train()
        found: Found = {"LPA steps": lpa_steps, "seconds": round(synchronized() - begin, 2)}
    logs = [entry for entry in trainer.state.log_history if "seconds_attack" in entry]
    for name, log in (("first step", logs[0]), ("last step", logs[-1])):
        found |= {f"{name}: {part} s": round(log[f"seconds_{part}"], 3) for part in ("attack", "defence", "other")}
    return found | measures.peaks()


@piece("run")
def run(dry: bool) -> Cases:
    """30 LPA steps of 16 pairs through LPATrainer, and peak memory of LPA steps at micro-batches of 2."""
    steps, whole, small = 2 if dry else 30, shape("llama", BATCH, dry), shape("llama", 2, dry)
    return {
        "llama, 16 pairs at once, stack": lambda: train(whole, steps, attack_engine="stack"),
        "llama, 16 pairs at once, packed": lambda: train(whole, steps, attack_engine="packed"),
        "llama, 8 x 2 pairs, 2 LPA steps": lambda: train(small, 2),
        "llama, 8 x 2 pairs, 2 LPA steps, not captured": lambda: train(small, 2, attack_capture_graph="off"),
        "llama, 8 x 2 pairs, 2 LPA steps, checkpointed": lambda: train(small, 2, gradient_checkpointing=True),
        "qwen3, 16 pairs at once": lambda: train(shape("qwen3", BATCH, dry), steps),
    }


# ---- shared prefixes -------------------------------------------------------------------------------------------------


@piece("prefix")
def prefix(dry: bool) -> Cases:
    """A DPO step's policy pass, forward and backward, 7B, completions of 64, by each library."""
    config = CONFIGS["llama"] | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}
    config |= {"max_position_embeddings": 16384} | (TINY if dry else {})

    def step(prompt: int, way: str) -> Found:
        own = Shape("7B", config, (), 1 if prompt > 4096 else 2, prompt, 64, 64, torch.bfloat16)
        return preference.step(own, way, 1 if dry else 5)

    lengths = (16,) if dry else (128, 1024, 8192)
    return {f"prompt {n}, {way}": partial(step, n, way) for n, way in pairings(lengths, preference.WAYS)}


# ---- the real model --------------------------------------------------------------------------------------------------

RATES = (8e-5, 3e-4, 1e-3, 3e-3, 3e-5)
EVERY, LAST = 30, 200  # LPA steps between checkpoints, and of a run
COLUMNS = {  # of the table: suite, metric, set
    "harmful done": ("attacks", "done: direct", "strongreject"),
    "benign not done": ("overrefusal", "not done", "benign"),
    "perplexity": ("utility", "perplexity", "prose"),
    "agrees: undesirable": ("traits", "agrees, clean", "undesirable"),
    "agrees: desirable": ("traits", "agrees, clean", "desirable"),
    "collapsed": ("collapse", "collapsed", "benign"),
}


@piece("real")
def real(dry: bool) -> Cases:
    """The embedded model at the papers' settings, over rates and seeds, anchored and not; each run is evaluated."""
    names = {True: "with the KL term", False: "as published"}
    return {
        f"{names[anchored]}, rate {rate:g}, seed {seed}": partial(trained, rate, seed, anchored, dry)
        for seed, anchored, rate in list(pairings(range(3), (True, False), RATES))[: 1 if dry else None]
    }


def trained(rate: float, seed: int, anchored: bool, dry: bool) -> Found:
    """Train one run and evaluate some of its checkpoints; everything but the numbers is deleted afterwards."""
    from lpa.assets import AssetError
    from lpa.commands import train as command
    from lpa.data import ASSESSMENT_PROMPT, PLAIN_PROMPT
    from lpa.evaluation import BASE, Settings, evaluate
    from lpa.models import DEFAULT_MODEL, ModelError, resolve

    place = Path(tempfile.mkdtemp(prefix="real-"))
    if dry:
        from tests.support.tiny import saved_tiny

        model = saved_tiny(place / "tiny")
    else:
        try:
            model = resolve(DEFAULT_MODEL)
        except (ModelError, AssetError) as error:
            raise Skip(f"{DEFAULT_MODEL} must be in the cache (lpa assets fetch): {str(error)[:200]}") from error
    last, every = (2, 1) if dry else (LAST, EVERY)
    asked = PLAIN_PROMPT if anchored else ASSESSMENT_PROMPT
    flags = {"lpa_steps": last, "save_steps": 4 * every, "save_total_limit": last, "attack_steps": 16, "seed": seed,
             "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "defence_steps": 4,
             "attack_step_size": 1e-3, "attack_epsilon": 6, "learning_rate": rate, "kl_coef": int(anchored),
             "system_prompt": asked} | ({"benign": "own"} if anchored else {})  # fmt: skip
    if dry:
        flags |= {"attack_steps": 2, "per_device_train_batch_size": 2}
    words = ["--preset", "none", "--model", model, "--output", str(place / "run"), "--measure", "false"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if code := command.run([*words, *(["--use_cpu"] if dry else [])]):
        raise RuntimeError(f"lpa train ended with {code}")
    points = {n: place / f"run/checkpoint-{4 * n}" for n in ((1,) if dry else (30, 60, 120))} | {last: place / "run"}
    adapters = {f"step {n}": str(point) for n, point in points.items()}
    settings = Settings(limit=2, max_new_tokens=2, sets=()) if dry else Settings(
        sets=("strongreject",), limit=200, attacks=("direct",), max_new_tokens=64, trait_prompt=PLAIN_PROMPT,
        epsilons=(), steps=(), utility_sets=(),
    )  # fmt: skip
    suites = ("collapse",) if dry else ("traits", "attacks", "overrefusal", "utility", "collapse")
    found = evaluate(model, adapters, suites=suites, output=place / "evaluation", settings=settings,
                     batch_size=2 if dry else 100)  # fmt: skip
    shutil.rmtree(place)

    def value(subject: str, where: tuple[str, str, str]) -> float | None:
        try:
            return found.value(subject, *where)
        except KeyError:  # its suite or set was not measured
            return None

    subjects = {"before": BASE} | {name: name for name in adapters}
    return {n: {title: value(s, where) for title, where in COLUMNS.items()} for n, s in subjects.items()}
