"""One thread: the tests' networks are too small for two, and suites beside each other would fight for the cores."""

import torch

torch.set_num_threads(1)
