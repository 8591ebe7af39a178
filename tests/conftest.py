"""One thread a process: the models are tiny, and threads that wait for each other on a busy machine cost most."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
