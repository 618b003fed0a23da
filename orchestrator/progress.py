"""One live line about a sweep: trials done, samples per second, time left; plain lines without a terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Seconds between two plain lines.
_PLAIN_EVERY = 15.0
# Trials' worth of work from which on the time left can be told.
_TELLING = 0.1


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Ahead:
    """Counts the images of work that comes before the trials."""

    def __init__(self, work: str) -> None:
        self.work, self.total, self.done = work, 0, 0
        self.started = self.last = time.monotonic()

    def line(self) -> str:
        """The state in one line."""
        elapsed = (self.last if self.done == self.total else time.monotonic()) - self.started
        parts = [f"{self.work}: {self.done}/{self.total} images"]
        parts += [f"{self.done / elapsed:.0f} images/s"] if self.done and elapsed else []
        parts += [f"{duration(elapsed)} gone"]
        if 0 < self.done < self.total:
            parts += [f"{duration((self.total - self.done) * elapsed / self.done)} left"]
        return ", ".join(parts)


class Progress:
    """Counts trials and shows where a sweep is; a context manager."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.before = done
        self.failed = 0
        # Running trials by fingerprint: share of their steps done, samples per second.
        self.running: dict[str, tuple[float, float]] = {}
        # Work before the trials, by its name.
        self.before_trials: dict[str, Ahead] = {}
        self.started = time.monotonic()
        self.shown = self.started
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(
                console=console,
                transient=True,
                refresh_per_second=2,
                get_renderable=lambda: Text(self.line()),
            )

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def begin(self, key: str) -> None:
        """A trial starts."""
        self.running[key] = (0.0, 0.0)
        self.show()

    def event(self, key: str, event: Mapping[str, Any]) -> None:
        """A trial has reported."""
        share, speed = self.running.get(key, (0.0, 0.0))
        steps = event.get("num_steps", 0)
        share = event.get("step", 0) / steps if steps else share
        self.running[key] = (share, float(event.get("samples_per_second", speed)))
        self.show()

    def end(self, key: str, name: str, failed: str = "") -> None:
        """A trial has ended, well or with an error's one line."""
        self.running.pop(key, None)
        self.done += 1
        self.failed += bool(failed)
        if failed:
            self.say(f"{name} failed: {failed}")
        elif self.live is None:
            self.say(self.line())
        self.show()

    def ahead(self, work: str, total: int, done: int) -> None:
        """Work before the trials has so many more images to do, and has done; the line is about the work begun last."""
        if total or done:
            part = self.before_trials.setdefault(work, Ahead(work))
            part.total, part.done, part.last = part.total + total, part.done + done, time.monotonic()
        self.show()

    def end_ahead(self) -> None:
        """The trials are next, whose time counts from now; how far the work before them came stays on the screen."""
        for part in self.before_trials.values():
            self.say(part.line())
        if self.before_trials:
            self.before_trials = {}
            self.started = self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def line(self) -> str:
        """The state in one line."""
        if parts := [*self.before_trials.values()]:
            return parts[-1].line()
        elapsed = time.monotonic() - self.started
        # A copy, since the live line is drawn by a thread of its own.
        running = list(self.running.values())
        units = self.done - self.before + sum(share for share, _ in running)
        left = (self.total - self.before - units) * elapsed / units if units > _TELLING else None
        speed = sum(value for _, value in running)
        parts = [f"{self.done}/{self.total} trials", f"{len(running)} running"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{speed:.0f} samples/s"] if speed else []
        parts += [f"{duration(elapsed)} gone"]
        parts += [f"{duration(left)} left"] if left is not None else []
        return ", ".join(parts)

    def show(self) -> None:
        """Print the line now and then, where there is no live one."""
        now = time.monotonic()
        if self.live is None and now - self.shown > _PLAIN_EVERY:
            self.shown = now
            self.say(self.line())
