"""Times two functions in turn, so that what else the machine does meets both alike."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Median seconds of each side, and of the ratios of neighbouring repeats the median and the quartiles."""

    seconds: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]


def compare(first: Callable[[], None], second: Callable[[], None], repeats: int) -> Comparison:
    """Time both, 2 or more times, after three rounds of warm-up; who goes first alternates; ratio first / second."""
    pairs = [_pair(first, second, turn % 2 == 0) for turn in range(WARM_UP + repeats)][WARM_UP:]
    ratios = [one / other for one, other in pairs]
    low, _, high = quantiles(ratios, n=4)
    return Comparison(
        seconds=(median(one for one, _ in pairs), median(other for _, other in pairs)),
        ratio=median(ratios),
        quartiles=(low, high),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pair(first: Callable[[], None], second: Callable[[], None], in_order: bool) -> tuple[float, float]:
    if in_order:
        return _seconds(first), _seconds(second)
    other, one = _seconds(second), _seconds(first)
    return one, other


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
