"""Measures cases one after another, and says on what."""

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workloads import environment
from workloads.benchmarks.cases import Case
from workloads.benchmarks.sides import sides
from workloads.benchmarks.timing import Comparison, compare, one_thread

THREADS = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case as measured."""

    case: Case
    times: Comparison

    @property
    def met(self) -> bool | None:
        """Whether the median ratio is within the limit, where there is one."""
        return None if self.case.limit is None else self.times.ratio <= self.case.limit


def measure(cases: Sequence[Case], repeats: int) -> Iterator[Result]:
    """Each case's result as soon as there is one; raises `UserError` where a case needs PEFT and there is none."""
    for case in cases:
        with one_thread():
            result = Result(case=case, times=compare(*sides(case), repeats))
        yield result


def to_tree(results: Sequence[Result], repeats: int) -> dict[str, Any]:
    """Results and machine as plain values, ready for JSON; times in seconds."""
    rows = [
        {
            **asdict(result.case),
            "ours_seconds": result.times.seconds[0],
            "peer_seconds": result.times.seconds[1],
            "ratio": result.times.ratio,
            "quartiles": list(result.times.quartiles),
            "met": result.met,
        }
        for result in results
    ]
    return {"repeats": repeats, "environment": machine(), "cases": rows}


def machine() -> dict[str, str]:
    """What a record says of its environment, and PEFT's version, the processor, the number of threads."""
    try:
        peft = version("peft")
    except PackageNotFoundError:
        peft = "not installed"
    return {**environment.describe(), "peft": peft, "cpu": _cpu(), "threads": str(THREADS)}


def _cpu() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor()
