"""The only importer of ray: trials as tasks in placement groups, each rank in a process of its own.

The store, not Ray, knows what is done: a task writes its record before it returns.
"""

from harness.schedule.detached import detach as detach
from harness.schedule.reach import refuse_unreached as refuse_unreached
from harness.schedule.session import ray_session as ray_session
from harness.schedule.sweep import Tick as Tick
from harness.schedule.sweep import run_trials as run_trials
