"""A thread that pushes a running study to MLflow, so that a slow or lost server never holds up training."""

import logging
import threading
import traceback
from collections.abc import Callable

from orchestrator.tracking import Tracker

log = logging.getLogger("orchestrator")


class Uploader:
    """Pushes every few seconds until `close`; trouble is told once, written to the log, and tried again."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None], every: float = 2.0) -> None:
        self.tracker = tracker
        self.say = say
        self.every = every
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin to push in the background."""
        self._thread.start()

    def close(self, seconds: float = 60.0) -> bool:
        """Push one last time, with the parent's artifacts; returns whether all of it arrived."""
        self._stop.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.say(f"MLflow: the last upload to {self.tracker.uri} did not end in {seconds:.0f} s")
            return False
        return self._push(final=True)

    def _loop(self) -> None:
        while not self._stop.wait(self.every * (10 if self.lost else 1)):
            self._push(final=False)

    def _push(self, final: bool) -> bool:
        # Whatever goes wrong here, training has to go on: the record on disk is complete without MLflow.
        try:
            self.tracker.push(final=final)
        except Exception as error:
            log.warning("MLflow: %s", traceback.format_exc())
            if not self.lost:
                name = self.tracker.folder.name
                first = (str(error).splitlines() or [type(error).__name__])[0][:160]
                later = f"`orchestrator sync {name}` uploads later"
                self.say(f"MLflow: lost {self.tracker.uri} ({first}); training goes on, {later}")
            self.lost = True
            return False
        if self.lost:
            self.say(f"MLflow: {self.tracker.uri} is back; everything recorded so far is uploaded")
        self.lost = False
        return True
