"""Mixtures: how many samples of which domain a run sees, and in which order, as a pure function of the seed.

Budgets are nested: a domain's first n samples are the same for every budget of at least n, and the stream
of budget n is a prefix of the stream of budget 2n with the same weights. No sample comes again before its
domain is exhausted, unless `repeat` says so.

Source:  temperature: Raffel et al. 2020, arXiv:1910.10683, section 3.5.2; their limit on a domain's size is `caps`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workloads.config import DataConfig
from workloads.errors import require, require_known

# Keys that keep the random streams of one seed apart.
_PICK, _INTERLEAVE, _AGAIN = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place of the stream: sample `index` of the domain's pool."""

    domain: str
    index: int
    # The task that the sample is learned for; empty: its domain.
    task: str = ""


def domains(config: DataConfig) -> list[str]:
    """The domains with a weight above 0, in the order of their names."""
    return sorted(domain for domain, weight in config.mixture.items() if weight > 0)


def multiples(config: DataConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Domain -> its budget as a multiple of `unit`, in the order of names; `sizes` are numbers of samples."""
    given = {domain: config.mixture[domain] for domain in domains(config)}
    everything = config.samples == 0 and config.tokens == 0
    if config.temperature == 0 and not everything:
        return given
    sizes = {domain: _capped(config, domain, sizes[domain]) for domain in given}
    if everything:
        return {domain: weight * sizes[domain] for domain, weight in given.items()}
    shares = {domain: weight * sizes[domain] ** (1 / config.temperature) for domain, weight in given.items()}
    total = sum(shares.values())
    assert total > 0, "no domain has samples"
    return {domain: share * sum(given.values()) / total for domain, share in shares.items()}


def unit(config: DataConfig) -> int:
    """Samples, or tokens, that a domain of multiple 1 contributes."""
    return config.tokens or config.samples or 1


def counts(config: DataConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Samples of each domain under a budget in samples."""
    assert config.tokens == 0, "the budget is in tokens"
    return {domain: round(part * unit(config)) for domain, part in multiples(config, sizes).items()}


def check(config: DataConfig, available: Mapping[str, int]) -> None:
    """Raise `UserError` on unknown domains and on budgets larger than the data, as far as sizes tell."""
    require_known("data.mixture.", config.mixture, available)
    for domain in domains(config):
        size = _capped(config, domain, available[domain])
        require(
            size >= 1, f"data.mixture.{domain}", config.mixture[domain], f"{domain} has no usable samples"
        )
    if config.tokens:
        return
    for domain, count in counts(config, available).items():
        allowed = "at least one sample (weight x data.samples)"
        require(count >= 1, f"data.mixture.{domain}", config.mixture[domain], allowed)
        size = _capped(config, domain, available[domain])
        fresh = {"fresh": count, "repeat": min(count, config.samples), "cycle": 1}[config.upsample]
        key = f"data.samples ({fresh} of {domain})"
        require(fresh <= size, key, config.samples, f"{domain} has {size} samples")


def stream(
    config: DataConfig,
    accepted: Mapping[str, Sequence[int]],
    seed: int,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> list[Slot]:
    """The whole stream of a run; `accepted` holds the usable pool indices of each domain.

    `lengths` are the tokens of each pool's samples by pool index; a budget in tokens needs them.
    """
    parts = multiples(config, {domain: len(accepted[domain]) for domain in domains(config)})
    picked = picks(config, accepted, seed, lengths)
    names = list(picked)
    keys: list[np.ndarray] = []
    for domain, pick in picked.items():
        costs = _costs(pick, _lengths(config, domain, lengths))
        jitter = _random(seed, _INTERLEAVE, domain).random(len(pick))
        # Place of a sample among all samples; a common factor in the budgets leaves the order unchanged.
        keys.append((np.cumsum(costs) - costs + jitter * costs) / parts[domain])
    owner = np.repeat(np.arange(len(names)), [len(pick) for pick in picked.values()])
    index = np.concatenate(list(picked.values()))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return [Slot(domain=names[owner[i]], index=int(index[i])) for i in order]


def picks(
    config: DataConfig,
    accepted: Mapping[str, Sequence[int]],
    seed: int,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Domain -> the pool indices that `stream` has of it, in its order, without that between domains."""
    parts = multiples(config, {domain: len(accepted[domain]) for domain in domains(config)})
    return {
        domain: _pick(
            config, domain, np.asarray(accepted[domain], dtype=np.int64), _lengths(config, domain, lengths),
            part * unit(config), seed,
        )
        for domain, part in parts.items()
    }  # fmt: skip


def _lengths(
    config: DataConfig, domain: str, lengths: Mapping[str, Sequence[int]] | None
) -> np.ndarray | None:
    """The tokens of a domain's samples, where the budget is in tokens."""
    return np.asarray(lengths[domain]) if config.tokens and lengths is not None else None


def _pick(
    config: DataConfig,
    domain: str,
    accepted: np.ndarray,
    lengths: np.ndarray | None,
    budget: float,
    seed: int,
) -> np.ndarray:
    """Pool indices of a domain's samples in order: a seeded permutation, and what follows when it is used up."""
    assert config.tokens == 0 or lengths is not None, "a budget in tokens needs lengths"
    base = _random(seed, _PICK, domain).permutation(accepted)[: config.caps.get(domain)]
    fresh = {"fresh": budget, "repeat": min(budget, unit(config)), "cycle": 1.0}[config.upsample]
    held = float(_costs(base, lengths).sum())
    _require_enough(config, domain, fresh, held)
    if config.upsample == "repeat":
        base = base[: _reach(base, lengths, fresh)]
        held = float(_costs(base, lengths).sum())
    passes = [base]
    while len(passes) * held < budget:
        again = _random(seed, _AGAIN, f"{len(passes)} {domain}")
        passes.append(again.permutation(base) if config.upsample == "cycle" else base)
    pick = np.concatenate(passes)
    return pick[: _reach(pick, lengths, budget)]


def _require_enough(config: DataConfig, domain: str, fresh: float, held: float) -> None:
    """Raise `UserError` when a domain has fewer samples, or tokens, than are to be fresh."""
    if config.tokens:
        key, named = f"data.tokens ({fresh:.0f} of {domain})", config.tokens
        require(fresh <= held, key, named, f"{held:.0f} tokens are usable")
    else:
        key, named = f"data.samples ({round(fresh)} of {domain})", config.samples
        require(round(fresh) <= held, key, named, f"{held:.0f} are usable")


def _reach(pick: np.ndarray, lengths: np.ndarray | None, budget: float) -> int:
    """How many of the samples come nearest to the budget; at least one of a budget in tokens."""
    if lengths is None:
        return round(budget)
    sums = np.cumsum(_costs(pick, lengths))
    first = int(np.searchsorted(sums, budget))
    before = sums[first - 1] if first else 0
    over = first < len(sums) and sums[first] - budget <= budget - before
    return max(1, first + int(over))


def _costs(pick: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """What each sample takes of the budget: 1, or its tokens."""
    return np.ones(len(pick)) if lengths is None else lengths[pick].astype(np.float64)


def _capped(config: DataConfig, domain: str, size: int) -> int:
    return min(size, config.caps.get(domain, size))


def _random(seed: int, purpose: int, domain: str) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *domain.encode()])
