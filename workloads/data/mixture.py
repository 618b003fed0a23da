"""Mixtures: how many samples of which domain a run sees, and in which order, as a pure function of the seed.

Budgets are nested: a domain's first n samples are the same for every budget of at least n, and the stream
of budget n is a prefix of the stream of budget 2n with the same weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workloads.config import DataConfig
from workloads.errors import require, require_known

# Keys that keep the random streams of one seed apart.
_PICK, _INTERLEAVE = 1, 2


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place of the stream: sample `index` of the domain's pool."""

    domain: str
    index: int


def counts(config: DataConfig) -> dict[str, int]:
    """Samples of each domain with a weight above 0, in the order of the domains' names."""
    items = sorted(config.mixture.items())
    return {domain: round(weight * config.samples) for domain, weight in items if weight > 0}


def check(config: DataConfig, available: Mapping[str, int]) -> None:
    """Raise `UserError` on unknown domains and on budgets larger than the data."""
    require_known("data.mixture.", config.mixture, available)
    for domain, count in counts(config).items():
        require(
            count >= 1,
            f"data.mixture.{domain}",
            config.mixture[domain],
            "at least one sample (weight x data.samples)",
        )
        fresh = count if config.upsample == "fresh" else min(count, config.samples)
        key = f"data.samples ({fresh} of {domain})"
        require(fresh <= available[domain], key, config.samples, f"{domain} has {available[domain]} samples")


def stream(config: DataConfig, accepted: Mapping[str, Sequence[int]], seed: int) -> list[Slot]:
    """The whole stream of a run; `accepted` holds the usable pool indices of each domain."""
    needed = counts(config)
    names = sorted(needed)
    picks = {domain: _pick(config, domain, accepted[domain], needed[domain], seed) for domain in names}
    keys: list[np.ndarray] = []
    for domain in names:
        jitter = _random(seed, _INTERLEAVE, domain).random(needed[domain])
        # Place of sample k among all samples; a common factor in the counts leaves the order unchanged.
        keys.append((np.arange(needed[domain]) + jitter) / config.mixture[domain])
    owner = np.repeat(np.arange(len(names)), [needed[domain] for domain in names])
    within = np.concatenate([np.arange(needed[domain]) for domain in names])
    order = np.argsort(np.concatenate(keys), kind="stable")
    return [Slot(domain=names[owner[i]], index=picks[names[owner[i]]][within[i]]) for i in order]


def _pick(config: DataConfig, domain: str, accepted: Sequence[int], needed: int, seed: int) -> list[int]:
    """Pool indices of a domain's samples in order: a seeded permutation, repeated when up-sampled by repeating."""
    order = _random(seed, _PICK, domain).permutation(np.asarray(accepted))
    fresh = needed if config.upsample == "fresh" else min(needed, config.samples)
    require(
        fresh <= len(order), f"data.samples ({fresh} of {domain})", config.samples, f"{len(order)} are usable"
    )
    return [int(order[k % fresh]) for k in range(needed)]


def _random(seed: int, purpose: int, domain: str) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *domain.encode()])
