"""Mistakes of the user, told in one line."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake of the user, told in one line: the key, the value, what is allowed, the nearest match."""


# Characters of a library's message that are shown; transformers and Ray write paragraphs.
_SHOWN = 200


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, cut to length; its class where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def reason_of(error: OSError) -> str:
    """What the system said, without its number and path; of an error that has no such words, its first line."""
    return error.strerror or first_line(error)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def require(ok: bool, key: str, value: object, allowed: str, choices: Iterable[str] = ()) -> None:
    """Raise the one-line `UserError` about `key` unless `ok`."""
    if not ok:
        raise UserError(f"{key}: {value!r} is not allowed; {allowed}{nearest(str(value), choices)}")


def require_known(prefix: str, keys: Iterable[Any], known: Iterable[str]) -> None:
    """Raise the one-line `UserError` about the first of `keys` that is not `known`."""
    names = list(known)
    for key in keys:
        if key not in names:
            raise UserError(
                f"unknown key '{prefix}{key}'{nearest(str(key), names)}; known keys: {', '.join(names)}"
            )
