"""Where everything is: run folders shared by all studies, a folder per study, and one writer for each.

<root>/runs/<fingerprint>/   a run's record, events, predictions, adapter and checkpoint
<root>/<study>/              study.json, mlflow.db, artifacts/, sync.json, report.html, driver.log
"""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from workloads.errors import UserError, nearest, reason_of
from workloads.record import is_finished, write_json

STUDY = "study.json"
ERROR = "error.txt"
STATUSES = ("pending", "running", "finished", "failed", "stopped", "interrupted")


class Store:
    """The folders under one root; creating it writes nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @property
    def calibration(self) -> Path:
        """Measured costs per method, for `plan`."""
        return self.root / "calibration.json"

    def run_folder(self, fingerprint: str) -> Path:
        """The folder of a run; it may not exist yet."""
        return self.root / "runs" / fingerprint

    def find_run(self, start: str) -> Path:
        """The folder of the one finished run whose fingerprint begins with `start`; raises `UserError`."""
        found = [path.parent for path in self.root.glob("runs/*/record.json")]
        mine = sorted(path for path in found if path.name.startswith(start))
        if len(mine) != 1:
            names = ", ".join(path.name for path in mine[:3])
            what = (
                f"begins {len(mine)} finished runs: {names}" if mine else f"is no finished run in {self.root}"
            )
            raise UserError(f"run: {start!r} {what}")
        return mine[0]

    def study_folder(self, name: str) -> Path:
        """The folder of a study; it may not exist yet."""
        return self.root / name

    def finished(self, fingerprint: str) -> bool:
        """Whether this run has a record, from whichever study."""
        return is_finished(self.run_folder(fingerprint))

    def require_writable(self) -> None:
        """Create the root if needed and prove that files can be written there; raises `UserError`."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe."):
                pass
        except OSError as error:
            raise UserError(f"--root: cannot write in {self.root}: {reason_of(error)}") from None

    def studies(self) -> list[str]:
        """Names of the studies that have started under this root."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{STUDY}"))

    def read_study(self, name: str) -> dict[str, Any]:
        """study.json of a started study; raises `UserError` when there is none."""
        path = self.study_folder(name) / STUDY
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            names = self.studies()
            have = f"started studies: {', '.join(names)}" if names else "no study has started there"
            raise UserError(f"study: {name!r} is not in {self.root}; {have}{nearest(name, names)}") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None

    def is_driven(self, name: str) -> bool:
        """Whether a process is running this study right now."""
        path = self.study_folder(name) / ".lock"
        if not path.is_file():
            return False
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def only_driver(self, name: str) -> Iterator[Path]:
        """The study's folder while this process is its only driver; raises `UserError` otherwise."""
        self.require_writable()
        folder = self.study_folder(name)
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("a+", encoding="utf-8") as file:
            if not _locked(file):
                file.seek(0)
                raise UserError(f"study {name}: process {file.read().strip()} is running it already")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield folder


def _locked(file: TextIO) -> bool:
    """Take the lock; a `status` that looks at it holds it for an instant, so it is tried for half a second."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder: a second process that wants the same run waits, then finds it finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Ledger:
    """study.json of a running study: one row per trial, written whenever one changes state."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.path = folder / STUDY
        self.tree = tree

    def write(self) -> None:
        """Write the whole file atomically."""
        write_json(self.path, self.tree)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The trials, in the order of the study."""
        return self.tree["trials"]

    def add(self, row: dict[str, Any]) -> None:
        """Append a trial that a search has drawn, unless it is there."""
        key = (row["fingerprint"], row["arm"], row["seed"])
        if all((old["fingerprint"], old["arm"], old["seed"]) != key for old in self.rows):
            self.rows.append(row)

    def mark(self, fingerprint: str, status: str, time: float, error: str = "") -> None:
        """Set the state of every trial with this fingerprint and write."""
        assert status in STATUSES, status
        for row in self.rows:
            if row["fingerprint"] == fingerprint:
                row.update(status=status, error=error)
                row["started" if status == "running" else "ended"] = time
        self.write()

    def place(self, fingerprint: str, where: str) -> None:
        """Note the process that a trial runs in; written with the next change of state."""
        for row in self.rows:
            if row["fingerprint"] == fingerprint:
                row["where"] = where

    def interrupt(self, time: float) -> None:
        """What was running is interrupted: the study can go on from its checkpoints."""
        for row in self.rows:
            if row["status"] == "running":
                row.update(status="interrupted", ended=time)
        self.write()
