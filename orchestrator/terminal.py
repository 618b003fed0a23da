"""Where commands print to: the terminal, or plain text that is wide enough for tables in a pipe or a log."""

import os

from rich.console import Console

_PLAIN_WIDTH = 140


def console() -> Console:
    """A console for stdout; without a terminal it is as wide as COLUMNS says, or as a table needs."""
    made = Console()
    if made.is_terminal or "COLUMNS" in os.environ:
        return made
    return Console(width=_PLAIN_WIDTH)


def say(out: Console, text: str) -> None:
    """Print one line as it is: not wrapped, not coloured, no markup."""
    out.print(text, highlight=False, soft_wrap=True, markup=False)
