"""What the ranks of tests do: train a tiny model, with faults where asked for, and leave its weights behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor

from lpa import LPAConfig, LPATrainer
from lpa.memory import PlanShape
from lpa.training.step import LPAStep
from lpa_kernels import LatentPGD
from tests.support import faults as faulty
from tests.support.tiny import rows, tiny_config, tiny_model, tiny_tokenizer

# everything that has a state: dropout, random starts, the benign stream, an optimiser and a schedule that go on
STATEFUL: dict[str, Any] = {
    "micro_batches": 2,
    "save_strategy": "steps",
    "kl_coef": 0.2,
    "lora_dropout": 0.1,
    "attack_random_start": True,
    "reset_optimizer": False,
    "lr_scheduler_type": "linear",
}


def trainer_of(
    folder: Path, *, data: Any = None, fsdp: bool = False, micro_batches: int = 4, **settings: Any
) -> LPATrainer:
    """On as many ranks as the environment says.

    Args:
        fsdp: with FSDP2, which accelerate itself leaves out on CPUs.
        micro_batches: of an LPA step, over all ranks.
    """
    tokenizer = tiny_tokenizer()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = tiny_config(
        folder,
        **{"gradient_accumulation_steps": micro_batches // world, "attack_engine": "packed", "fsdp": fsdp, **settings},
    )
    if fsdp:
        allow_fsdp(config)
    model = tiny_model(len(tokenizer), max_position_embeddings=256)  # room for canaries
    trainer = LPATrainer(model, config, rows(8) if data is None else data, tokenizer)
    assert trainer.is_fsdp_enabled == fsdp
    return trainer


def allow_fsdp(config: LPAConfig) -> None:
    """Have accelerate take these CPUs for GPUs, so that it shards over them."""
    assert config.device.type == "cpu"  # and with that the process group is there
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def planned_data(shape: PlanShape, config: LPAConfig, rows: int) -> dict[str, Any]:
    """Arguments of `LPATrainer`: data of a plan's lengths, benign ones too where the config has a term for them."""

    def texts(prompt: int, answer: int, size: int) -> tuple[Tensor, Tensor]:
        """(ids, True at the answer's tokens), [size, prompt + answer] each."""
        mask = (torch.arange(prompt + answer) >= prompt).expand(size, prompt + answer)
        return torch.zeros(mask.shape, dtype=torch.long), mask.clone()

    def pairs(some: list[Any]) -> dict[str, Any]:
        ids, mask = texts(shape.prompt, shape.completion, len(some))
        return {"rejected_ids": ids, "rejected_mask": mask, "chosen_ids": ids + mask.long(),
                "chosen_mask": mask.clone(), "attack_mask": torch.ones_like(mask)}  # fmt: skip

    def benign(some: list[Any]) -> dict[str, Any]:
        ids, mask = texts(shape.benign_prompt, shape.benign_answer, len(some))
        return {"benign_ids": ids, "benign_mask": mask}

    data = Dataset.from_dict({"number": list(range(rows))})
    given: dict[str, Any] = {"train_dataset": data, "data_collator": pairs}
    return given | ({"benign_dataset": data, "benign_collator": benign} if {"sft", "kl"} & set(config.coefs) else {})


def command(arguments: list[str]) -> None:
    """`lpa train --fsdp` with these arguments."""
    from lpa.cli import main
    from lpa.training import trainer

    start = trainer.LPATrainer.__init__

    def allowed(self: Any, model: Any, args: Any, *more: Any, **options: Any) -> None:
        allow_fsdp(args)
        start(self, model, args, *more, **options)
        assert self.is_fsdp_enabled

    trainer.LPATrainer.__init__ = allowed  # type: ignore[method-assign]
    assert main(["train", "--fsdp", *arguments]) == 0


def weights(trainer: LPATrainer) -> dict[str, Tensor]:
    """What was trained, whole."""
    found = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in found.items()}


def keep(trainer: LPATrainer, folder: Path) -> None:
    """weights.pt, by rank 0, and log.pt: what was logged of each LPA step; of canaries, canaries.json."""
    found = weights(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, folder / "weights.pt")
        torch.save([entry for entry in trainer.state.log_history if "lpa_step" in entry], folder / "log.pt")
        if trainer.canaries is not None:
            (folder / "canaries.json").write_text(json.dumps(trainer.canaries.record()))


def train(folder: Path, settings: dict[str, Any], resume: bool = False) -> None:
    """Train to the end."""
    trainer = trainer_of(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert not trainer.interrupted
    keep(trainer, folder)


def fail(folder: Path, settings: dict[str, Any]) -> None:
    """Train; in the second LPA step the attack of the last rank finds a loss that is not finite."""
    trainer = trainer_of(folder, **settings)
    attack = LatentPGD.attack

    def failing(*args: Any, **kwargs: Any) -> Any:
        found = attack(*args, **kwargs)
        if trainer.lpa_step == 1 and trainer.args.process_index == trainer.args.world_size - 1:
            raise FloatingPointError("the adversary's loss is nan at inner step 0")
        return found

    LatentPGD.attack = failing  # type: ignore[method-assign]
    trainer.train()


def run_out(folder: Path, settings: dict[str, Any], faults: list[tuple[int, str, set[int]]]) -> None:
    """Train to the end; `faults` says which rank runs out of memory, where and in which calls, as `faults.run_out`."""
    trainer = trainer_of(folder, **settings)
    for rank, where, calls in faults:
        if rank == trainer.args.process_index:
            faulty.run_out(pytest.MonkeyPatch(), trainer, where, calls)
    trainer.train()
    keep(trainer, folder)
    (folder / f"size-{trainer.args.process_index}").write_text(str(trainer._memory.size))


def stop(folder: Path, settings: dict[str, Any]) -> None:
    """Train; in the attack of the second LPA step SIGTERM reaches the last rank alone, and all save and leave."""
    trainer = trainer_of(folder, **settings)
    attack = LPAStep.attack
    signal.signal(signal.SIGTERM, lambda number, frame: trainer.request_stop())

    def interrupted(step: LPAStep, parts: Any) -> None:
        if trainer.lpa_step == 1 and trainer.args.process_index == trainer.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        attack(step, parts)

    LPAStep.attack = interrupted  # type: ignore[method-assign]
    trainer.train()
    assert trainer.interrupted
    assert trainer.lpa_step == 1


def die(folder: Path, settings: dict[str, Any], place: str) -> None:
    """Train; in the second LPA step this process kills itself as nothing can catch, in one of PLACES."""
    from lpa.training import checkpoint, durable

    trainer = trainer_of(folder, **settings)

    def at(owner: Any, name: str, when: Any = lambda: True, after: bool = True) -> None:
        function = getattr(owner, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs) if after or not when() else None
            if when():
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, dying)

    second = lambda: trainer.lpa_step == 1  # noqa: E731
    saving = lambda: trainer.lpa_step == 2  # noqa: E731
    if place == "attack":
        at(LPAStep, "attack", second)
    elif place == "update":
        at(trainer, "_get_grad_norm", lambda: second() and trainer.next_update == 1)
    elif place == "write":
        at(trainer, "_save_optimizer_and_scheduler", saving)
    elif place == "list":
        at(checkpoint, "sync_tree", saving)
    elif place == "rename":
        at(durable, "publish", saving)
    trainer.train()


PLACES = ("attack", "update", "write", "list", "rename")


def difference(one: Path, other: Path) -> float:
    """The largest, of any trained weight."""
    a, b = (torch.load(folder / "weights.pt") for folder in (one, other))
    assert a.keys() == b.keys()
    assert a
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def moved(folder: Path, settings: dict[str, Any]) -> float:
    """How far training has moved the weights from where they began, at most."""
    start = weights(trainer_of(folder / "start", **settings))
    end = torch.load(folder / "weights.pt")
    return max(float((start[name] - end[name]).abs().max()) for name in start)


# what a rank has must differ: ragged rows, and fewer of them than a batch takes
RAGGED = [row | {"rejected": "I agree ." if n % 2 else row["rejected"] + " I agree"}
          for n, row in enumerate(rows(5))]  # fmt: skip
