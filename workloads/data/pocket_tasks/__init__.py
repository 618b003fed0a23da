"""A stream of tasks for continual tuning, composed from the pictures of `pocket` and answered in forms that clash.

`compose` makes one sample, a pure function of its arguments; `pool.pool` a cached data set of them.
"""

from workloads.data.pocket_tasks.composing import Asked, compose
from workloads.data.pocket_tasks.tasks import NEVER_TRAINED, TASKS, TRAINED, Task
from workloads.data.pocket_tasks.wording import TYPES, WORDINGS

__all__ = ["NEVER_TRAINED", "TASKS", "TRAINED", "TYPES", "WORDINGS", "Asked", "Task", "compose"]
