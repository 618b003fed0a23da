"""What runs will look up, made ahead of them by makers side by side: pools vetted, then the tower's features.

Makers share files alone: each does its part, and finds there what the others have done. What is missing in the end a
run makes itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from workloads import meeting
from workloads.config import DataConfig, RunConfig
from workloads.data import mixture, pool, sources
from workloads.data.pool import Pool
from workloads.errors import UserError
from workloads.llava import tower
from workloads.llava.build import Llava, build
from workloads.run import check_base, choose
from workloads.training import engine

# Rows between two reports.
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Step:
    """Images that are to be done, or that are done now; or why some runs are left out."""

    work: str = ""
    total: int = 0
    done: int = 0
    fault: str = ""


def make(configs: Sequence[RunConfig], part: int = 0, parts: int = 1) -> Iterator[Step]:
    """Do one of `parts` parts of what is not there of all that runs with a feature cache look up.

    Stages are taken without those before them, whose samples are among what those look up themselves. A run that will
    fail is left out, with its fault; faults of settings and samples come before the first feature is made.
    """
    torch.set_num_threads(max(config.execution.threads for config in configs))
    groups: defaultdict[str, list[RunConfig]] = defaultdict(list)
    for config in meeting.distinct(configs).values():
        groups[meeting.base(config)].append(config)
    bases = [_Base(runs) for runs in groups.values()]
    load = _one_at_a_time()
    for base in bases:
        try:
            yield from base.vet(load(base), part, parts)
            yield from base.look(load(base))
        except UserError as error:
            yield Step(fault=str(error))
    for base in bases:
        if base.rows:
            yield from base.fill(load(base), part, parts)


def _one_at_a_time() -> Callable[["_Base"], Llava]:
    """What loads a base, or has it still; another one is let go first, so that there is one in memory."""
    held: dict[_Base, Llava] = {}

    def load(base: _Base) -> Llava:
        if base not in held:
            held.clear()
            held[base] = base.load()
        return held[base]

    return load


class _Base:
    """Runs with one base model, the pools that they read, and the rows that they look up."""

    def __init__(self, runs: list[RunConfig]) -> None:
        self.runs = runs
        # Levels of the tower -> key of a pool -> the pool and its rows.
        self.rows: defaultdict[tuple[int, ...], dict[str, tuple[Pool, set[int]]]] = defaultdict(dict)
        self._pools: dict[tuple[str, ...], Pool] = {}

    def load(self) -> Llava:
        """The base model, its tower where it computes; raises `UserError` as a run does."""
        llava = build(self.runs[0].model, self.runs[0].optim.dtype)
        tower.tower_of(llava).to(engine.device())
        return llava

    def vet(self, llava: Llava, part: int, parts: int) -> Iterator[Step]:
        """Compose and vet every `parts`-th pool, unless that is done."""
        found: dict[tuple[str, ...], DataConfig] = {}
        for run in self.runs:
            # Verdicts do not depend on what is shown of a picture.
            data = replace(run.data, blind=False)
            names = [(domain, "train") for domain in mixture.domains(data)]
            names += [(domain, run.eval.split) for domain in sources.evaluated(run)]
            for name in names:
                found.setdefault((*name, meeting.held(data)), data)
        todo = [
            (data, domain, split, sources.of(data).size(domain, split))
            for (domain, split, _), data in list(found.items())[part::parts]
            if not pool.is_vetted(data, domain, split, llava.prompter)
        ]
        yield Step(work="pictures", total=sum(size for *_, size in todo))
        for data, domain, split, size in todo:
            with suppress(UserError):  # `look` tells it
                pool.load(data, domain, split, llava.prompter)
            yield Step(work="pictures", done=size)

    def look(self, llava: Llava) -> Iterator[Step]:
        """Find the rows of every run, waiting for pools that others vet; tells the faults of those that will fail."""
        for run in self.runs:
            try:
                check_base(run, llava)
                levels = tuple(tower.levels_of(llava, meeting.cues(run.model)))
                seen = choose(run, [], partial(self._read, llava, run.data))
            except UserError as error:
                yield Step(fault=str(error))
                continue
            for each, indices in seen.met(run):
                self.rows[levels].setdefault(each.key, (each, set()))[1].update(indices)

    def fill(self, llava: Llava, part: int, parts: int) -> Iterator[Step]:
        """Make every `parts`-th chunk of rows, as far as they are missing or not whole."""
        lacking: list[tuple[Pool, list[int], tuple[int, ...]]] = []
        for levels, rows in self.rows.items():
            try:
                opened = tower.with_features(llava, [plain for plain, _ in rows.values()], levels)
            except UserError as error:
                yield Step(fault=str(error))
                continue
            for first, (each, (_, indices)) in enumerate(zip(opened, rows.values(), strict=True)):
                assert each.features is not None, "an opened pool has features"
                mine = [i for n, i in enumerate(sorted(indices)) if (n // _CHUNK + first) % parts == part]
                lacking.append((each, each.features.missing(mine), levels))
        yield Step(work="features", total=sum(len(missing) for _, missing, _ in lacking))
        for each, missing, levels in lacking:
            try:
                for start in range(0, len(missing), _CHUNK):
                    chunk = missing[start : start + _CHUNK]
                    tower.fill(llava, each, chunk, levels)
                    yield Step(work="features", done=len(chunk))
            except UserError as error:
                yield Step(fault=str(error))

    def _read(self, llava: Llava, data: DataConfig, domain: str, split: str) -> Pool:
        key = (domain, split, meeting.held(data))
        if key not in self._pools:
            self._pools[key] = pool.load(data, domain, split, llava.prompter)
        return self._pools[key]
