"""The processes of the tests: one thread each, no search for garbage among what the imports have made, and GPUs."""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

# the models are tiny, and threads that wait for each other on a busy machine cost most
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, or where LPA_TEST_DEVICE says cpu."""
    has_gpu = torch.cuda.is_available() and os.environ.get("LPA_TEST_DEVICE", "cuda") == "cuda"
    if item.get_closest_marker("gpu") and not has_gpu:
        pytest.skip("needs a GPU")


def pytest_collection_finish() -> None:
    """Accelerate collects garbage at the start of every training run, a third of the time of a tiny one."""
    gc.collect()
    gc.freeze()
