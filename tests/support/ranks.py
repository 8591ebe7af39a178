"""Run a function in processes of its own, one a rank, forked from a server that has imported torch and lpa once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lpa.training.trainer", "lpa.commands.train", "tests.support.jobs"])


def _free_port() -> str:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return str(it.getsockname()[1])


def _rank(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment | {"LPA_TEST_DEVICE": "cpu"})  # ranks meet over gloo
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # as after an error in a script, but without waiting for what other ranks owe


class Ranks:
    """Running processes. `logs[rank]` is the file with what a rank has printed."""

    def __init__(self, function: Callable[..., None], *arguments: Any, folder: Path, world: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        port, self.processes = _free_port(), []
        for rank, log in enumerate(self.logs):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            if world == 1:
                environment = {}
            process = _context.Process(target=_rank, args=(function, arguments, environment, log), daemon=True)
            process.start()
            self.processes.append(process)

    def finish(self, seconds: float = 240) -> list[int | None]:
        """The exit codes; of a rank that has not ended by then, which is killed, None."""
        end = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
        return codes

    def text(self, rank: int = 0) -> str:
        """What a rank has printed."""
        return self.logs[rank].read_text(encoding="utf-8") if self.logs[rank].exists() else ""


def run(function: Callable[..., None], *arguments: Any, folder: Path, world: int = 1) -> None:
    """Run `function(*arguments)` on every rank.

    Raises:
        AssertionError: a rank has failed; with what it printed.
    """
    ranks = Ranks(function, *arguments, folder=folder, world=world)
    codes = ranks.finish()
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(ranks.text(rank)[-3000:] for rank in range(world))
