"""The processes of the tests: one thread each, and no search for garbage among what the imports have made."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

# the models are tiny, and threads that wait for each other on a busy machine cost most
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Accelerate collects garbage at the start of every training run, a third of the time of a tiny one."""
    gc.collect()
    gc.freeze()
