"""Mistakes of the user, told in one line."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake of the user, told in one line: the key, the value, what is allowed, the nearest match."""


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
