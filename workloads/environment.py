"""What a run was computed with: versions, git commit, platform; and the memory it took."""

import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from workloads import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "datasets",
    "ray",
    "mlflow",
    "omegaconf",
    "pillow",
    "numpy",
)


def describe() -> dict[str, str]:
    """Versions of the packages that decide numbers, python, platform and the project's git commit."""
    packages = {name: version(name) for name in _PACKAGES}
    return {
        **packages,
        "project": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }


def git_commit() -> str:
    """The commit this code is at, `+changes` when the tree differs from it, or 'not a git checkout'."""
    here = Path(__file__).resolve().parent
    # A virtual environment may lie in a repository of the user's own.
    is_ours = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git(here, "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*")
    return commit if is_ours and commit else "not a git checkout"


def _git(folder: Path, *words: str) -> str:
    """What git prints, or nothing when it fails, is missing or takes too long."""
    try:
        ask = ["git", "-C", str(folder), *words]
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def reset_peak() -> None:
    """Start measuring the peak resident set anew, where the system allows it."""
    path = Path("/proc/self/clear_refs")
    with suppress(OSError):  # not there or not writable: the peak is the process's own
        path.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Largest resident set of this process since `reset_peak`, in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    match = re.search(r"VmHWM:\s+(\d+) kB", path.read_text(encoding="ascii"))
    assert match
    return int(match[1]) * 1024
