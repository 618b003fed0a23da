"""Task names to indices, for methods that are told which task a sample comes from.

Shape letters: B batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workloads.adapters.base import Trace
from workloads.errors import require


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise `UserError` unless `tasks` holds one name or more, each once."""
    require(bool(tasks), "adapter.tasks", list(tasks), "name the tasks in order")
    for task in tasks:
        require(task != "", "adapter.tasks", task, "a task has a name")
        require(list(tasks).count(task) == 1, "adapter.tasks", task, "name every task once")


def task_index(tasks: Sequence[str], task: str | None) -> int:
    """The place of `task` among `tasks`; raises `UserError` on any other name."""
    require(task in tasks, "task", task, f"adapter.tasks: {', '.join(tasks)}", tasks)
    return [*tasks].index(str(task))


class TaskIds:
    """The task of every sample of the batch as an index; looked up once a batch, not once a linear."""

    def __init__(self, trace: Trace, tasks: Sequence[str]) -> None:
        self.trace, self.tasks = trace, tuple(tasks)
        self._names: tuple[str, ...] = ()
        self._ids_B = torch.empty(0, dtype=torch.long)

    def __call__(self, num_samples: int, device: torch.device) -> Tensor:
        """Indices (B) on `device`; a sample of an unknown task is a `UserError`."""
        names = self.trace.tasks
        require(
            len(names) == num_samples,
            "tasks",
            list(names),
            f"this method needs one for each of {num_samples} samples",
        )
        if names is not self._names or self._ids_B.device != device:
            ids = [task_index(self.tasks, name) for name in names]
            self._names, self._ids_B = names, torch.tensor(ids, dtype=torch.long, device=device)
        return self._ids_B
