"""Search spaces and schedulers as Ray Tune objects, from the plain values of a study."""

from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from orchestrator.study import Search
from search_spaces.adapters import Space

# Draws of one study are the same every time, so that a search that was stopped finds its points again.
_SEARCH_SEED = 0


def sampled(space: Space) -> dict[str, Any]:
    """Dotted key -> a ray.tune domain."""
    out: dict[str, Any] = {}
    for key, part in space.items():
        word, arguments = next(iter(part.items()))
        out[key] = tune.choice(arguments) if word == "choice" else getattr(tune, word)(*arguments)
    return out


def scheduler(search: Search | None, max_step: int) -> TrialScheduler:
    """Which trials stop early: none, or those that successive halving finds behind at equal steps."""
    if search is None or search.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        metric=search.metric,
        mode=search.mode,
        max_t=max_step + 1,
        grace_period=max(1, max_step // 8),
        reduction_factor=3,
    )


def generator(slots: int) -> BasicVariantGenerator:
    """Grid and random points; every seed of a search meets the same points."""
    return BasicVariantGenerator(random_state=_SEARCH_SEED, constant_grid_search=True, max_concurrent=slots)
