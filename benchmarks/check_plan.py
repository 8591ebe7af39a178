"""Hold `lpa plan` against measured runs: peak memory of one LPA step on the CPU, each in a process of its own.

    python -m benchmarks.check_plan --out benchmarks/results/plan-check-cpu.json
    python -m benchmarks.check_plan --table benchmarks/results/plan-check-cpu.json   # measures nothing

A run is a real one (LPATrainer, two inner steps, two updates) on rows of exactly the planned lengths. The record holds
what was measured; the table sets today's plan beside it. The same run on a tiny model, the case "idle", measures what
Python and the libraries take by themselves.

Cases of several ranks run over gloo; each rank's memory is watched from the start of training on, when the weights are
where they belong, and the most that any held counts. They make two LPA steps: DDP's buckets are there in the second.

A plan is of tensors. glibc keeps much of what was freed unless large blocks are mapped one by one: the check is made so
(MALLOC_MMAP_THRESHOLD_), and the peak with glibc's defaults is noted beside where there is one process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import made_with, resident, table
from lpa.files import write_json

MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
EMBEDDED = "smollm2-135m-instruct"
WIDE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 12}  # fmt: skip
DEEP = {"model_type": "qwen3", "vocab_size": 8000, "hidden_size": 320, "intermediate_size": 1280, "head_dim": 64,
        "num_hidden_layers": 20, "num_attention_heads": 5, "num_key_value_heads": 5,
        "tie_word_embeddings": True}  # fmt: skip
NEOX = {"model_type": "gpt_neox", "vocab_size": 20000, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 10, "num_attention_heads": 8}  # fmt: skip
NOTHING = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def case(model: Any, prompt: int, completion: int, micro: int, accumulation: int = 2, **more: Any) -> dict[str, Any]:
    """A model, the lengths of rows, and settings of `LPAConfig`."""
    shape = {"prompt": prompt, "completion": completion, "benign_prompt": prompt, "benign_answer": completion}
    settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, **more}
    return {"model": model, "shape": shape, "settings": settings}


CASES = {
    "idle": case(NOTHING, 8, 4, 1),
    "embedded, merged adapters": case(EMBEDDED, 64, 8, 4, 1, attack_merge_adapters=True),
    "embedded, long": case(EMBEDDED, 192, 16, 2),
    "embedded, long, checkpointed": case(EMBEDDED, 192, 16, 2, gradient_checkpointing=True),
    "embedded, sft and kl": case(EMBEDDED, 64, 32, 4, kl_coef=0.1, sft_coef=0.1),
    "wide": case(WIDE, 128, 16, 4),
    "wide, large batch": case(WIDE, 64, 8, 16, 1),
    "wide, checkpointed": case(WIDE, 384, 32, 2, gradient_checkpointing=True),
    "deep": case(DEEP, 96, 8, 8),
    "deep, eager attention": case(DEEP, 192, 16, 2) | {"attn_implementation": "eager"},
    "deep, all weights": case(DEEP, 96, 8, 4, lora=False),
    "neox": case(NEOX, 128, 16, 8),
}
for name, more in {"DDP": {}, "FSDP2": {"fsdp": True}}.items():
    ranks = {"ranks": 2}
    CASES |= {
        f"idle, {name}": case(NOTHING, 8, 4, 1, lpa_steps=2, **more) | ranks,
        f"wide, {name}": case(WIDE, 128, 16, 4, lpa_steps=2, **more) | ranks,
        f"wide, merged, {name}": case(WIDE, 64, 8, 4, 1, lpa_steps=2, attack_merge_adapters=True, **more) | ranks,
        f"deep, all weights, {name}": case(DEEP, 96, 8, 4, lpa_steps=2, lora=False, **more) | ranks,
    }


def idle(name: str) -> str:
    """The case that tells what Python and the libraries take in this one."""
    return f"idle, {name.rpartition(', ')[2]}" if "ranks" in CASES[name] else "idle"


def settings_of(case: dict[str, Any], folder: str) -> Any:
    """The case's `LPAConfig`."""
    from lpa import LPAConfig

    fixed: dict[str, Any] = {"attack_steps": 2, "attack_engine": "packed", "defence_steps": 2, "lpa_steps": 1,
             "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "report_to": []}  # fmt: skip
    return LPAConfig(folder, **(fixed | case["settings"]))


def configuration(case: dict[str, Any]) -> Any:
    """The case's model, as a configuration of transformers."""
    from transformers import AutoConfig

    from lpa.models import resolve

    if isinstance(case["model"], str):
        return AutoConfig.from_pretrained(resolve(case["model"]))
    return AutoConfig.for_model(**case["model"])


def planned(case: dict[str, Any]) -> int:
    """Bytes at the peak, by `lpa plan`."""
    import torch

    from lpa.memory import PlanShape, estimate

    found = estimate(
        configuration(case),
        settings_of(case, tempfile.gettempdir()),
        PlanShape(**case["shape"]),
        dtype=torch.float32,
        attn_implementation=case.get("attn_implementation"),
        ranks=case.get("ranks", 1),
    )
    return found.peak.total()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case here; peak memory in bytes and seconds."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    from lpa import LPATrainer
    from lpa.memory import PlanShape
    from lpa.models import load
    from tests.support.jobs import allow_fsdp, planned_data

    class Reset(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of training alone

    attention = case.get("attn_implementation")
    torch.manual_seed(0)
    if isinstance(case["model"], str):
        model, _ = load(case["model"], attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(
            configuration(case), dtype=torch.float32, attn_implementation=attention
        )
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        config = settings_of(case, folder)
        if config.fsdp:
            allow_fsdp(config)
        trainer = LPATrainer(model, config, **planned_data(PlanShape(**case["shape"]), config, 64))
        del model
        if "ranks" in case:
            trainer.add_callback(Reset())
        trainer.train()
        assert trainer.is_fsdp_enabled == bool(config.fsdp)
    return {"bytes": round(resident("VmHWM") * (1 << 20)), "seconds": round(time.time() - begun, 1)}


def run(name: str, environment: dict[str, str]) -> dict[str, Any]:
    """Measure a case in processes of its own, one a rank; the one that took most."""
    command = [sys.executable, "-m", "benchmarks.check_plan", "--case", name]
    world = CASES[name].get("ranks", 1)
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = str(it.getsockname()[1])
    runs = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}  # fmt: skip
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment | place))
    texts = [run.communicate()[0] for run in runs]
    if failed := [run.returncode for run in runs if run.returncode]:
        raise RuntimeError(f"{name} failed with {failed}")
    found: list[dict[str, Any]] = [json.loads(text.splitlines()[-1]) for text in texts]
    return max(found, key=lambda one: one["bytes"])


def errors(record: dict[str, Any]) -> dict[str, tuple[int, int, int, float]]:
    """Case -> (planned, measured without Python and libraries, what these take, error) of the cases in a record."""
    found = {}
    for name, held in record["cases"].items():
        if name != idle(name):
            process = record["cases"][idle(name)]["measured"]["bytes"] - planned(CASES[idle(name)])
            plan, own = planned(CASES[name]), held["measured"]["bytes"] - process
            found[name] = plan, own, process, plan / own - 1
    return found


def as_table(record: dict[str, Any]) -> str:
    """Today's plan beside a record, in Markdown; GB of 10^9 bytes."""
    head = ("case", "planned", "measured", "error", "with Python and libraries", "measured with glibc's defaults")
    rows = []
    for name, (plan, own, process, error) in errors(record).items():
        plain = record["cases"][name].get("measured_glibc_defaults")
        defaults = f"{(plain['bytes'] - process) / 1e9:.3f}" if plain else "-"
        whole = (plan + process) / (own + process) - 1
        rows.append((name, f"{plan / 1e9:.3f}", f"{own / 1e9:.3f}", f"{error:+.1%}", f"{whole:+.1%}", defaults))
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=[n for n in CASES if "ranks" not in CASES[n]], choices=list(CASES))
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print the table of a record; measure nothing")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(CASES[options.case])))
        return
    if options.table:
        print(as_table(json.loads(options.table.read_text(encoding="utf-8"))), end="")
        return
    cases: dict[str, Any] = {}
    for name in dict.fromkeys(each for only in options.only for each in (idle(only), only)):
        cases[name] = CASES[name] | {"measured": run(name, MAPPED)}
        if "ranks" not in CASES[name]:
            cases[name]["measured_glibc_defaults"] = run(name, {})
    record = made_with() | {"environment": MAPPED, "cases": cases}
    print(as_table(record), end="")
    if options.out:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
