"""What holds for all tests.

One thread: the tests' networks are too small for two, and suites beside each other would fight for the cores. No
deadline for a property's examples: speed is a benchmark's matter.
"""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Files that take longest come first, so that the suite does not end with one process at work and another idle; `make
# test` keeps the order.
LONG = (
    *("test_engines", "test_cluster_of_hosts", "test_sweep", "test_find", "test_footprint", "test_predict"),
    *("test_zero_ranks", "test_ray_hosts", "test_two_drivers", "test_worker", "test_guarded", "test_hosts"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
