"""What holds for all tests.

One thread: the tests' networks are too small for two, and suites beside each other would fight for the cores. No
deadline for a property's examples: speed is a benchmark's matter.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
