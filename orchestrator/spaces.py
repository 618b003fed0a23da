"""Search spaces as plain values: `{dotted key: {sampling word: [arguments]}}`, checked without ray."""

from collections.abc import Mapping
from typing import Any

from search_spaces.adapters import Space
from search_spaces.optim import SPACES
from workloads.errors import require

# Sampling words of ray.tune and how many arguments each takes.
WORDS = {"uniform": 2, "loguniform": 2, "quniform": 3, "qloguniform": 3, "randint": 2, "lograndint": 2}


def read_space(value: Any, where: str) -> Space:
    """A named space, or a mapping checked word by word; raises `UserError`."""
    if isinstance(value, str):
        require(value in SPACES, where, value, f"a mapping or one of {', '.join(SPACES)}", SPACES)
        return SPACES[value]
    require(isinstance(value, Mapping) and bool(value), where, value, "a name or {key: {word: [arguments]}}")
    for key, part in value.items():
        label = f"{where}.{key}"
        good = isinstance(part, Mapping) and len(part) == 1
        require(good, label, part, "one sampling word, such as {loguniform: [0.0001, 0.01]}")
        word, arguments = next(iter(part.items()))
        choices = (*WORDS, "choice")
        require(word in choices, label, word, f"words: {', '.join(choices)}", choices)
        require(
            isinstance(arguments, list) and bool(arguments),
            f"{label}.{word}",
            arguments,
            "a list of arguments",
        )
        if word in WORDS:
            _check_range(arguments, WORDS[word], word, f"{label}.{word}")
    return {str(key): dict(part) for key, part in value.items()}


def _check_range(arguments: list[Any], count: int, word: str, label: str) -> None:
    numbers = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in arguments)
    require(numbers and len(arguments) == count, label, arguments, f"{count} numbers")
    low, high = arguments[:2]
    require(
        low < high and (low > 0 or "log" not in word),
        label,
        arguments,
        "low < high, and low > 0 for log words",
    )
