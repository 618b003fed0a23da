"""Features ahead of a sweep: tasks on the nodes of Ray make what its trials will look up, and the line says how far.

Nodes that share a cache folder share the work. What is not made here, a trial makes itself.
"""

import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.progress import Progress
from orchestrator.study import Resources
from orchestrator.trial import explain
from workloads import meeting
from workloads.config import RunConfig, from_tree, to_tree
from workloads.data.arrow import locked
from workloads.data.cache import cache_dir

# Seconds that a maker may take to start: a node whose CPUs others hold is left out.
_PATIENCE = 300.0


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Nodes that share a cache folder, and keys of what is lacking there."""

    nodes: list[str] = field(default_factory=list)
    lacking: list[str]


@dataclass(frozen=True, kw_only=True)
class Maker:
    """A task to come: a part of what is lacking, on a node."""

    node: str
    lacking: list[str]
    part: int
    parts: int


def build(
    configs: Sequence[RunConfig], resources: Resources, slots: int, progress: Progress, is_local: bool
) -> None:
    """Make what the runs will look up; what fails is told in one line, and left to the trials."""
    wanted = meeting.distinct(configs)
    # This machine's notes are those of a local Ray.
    if not wanted or (is_local and not meeting.lacking(wanted)):
        return
    token, faults = uuid.uuid4().hex, set[str]()
    need = {"CPU": float(configs[0].execution.threads), "GPU": resources.gpus_per_worker}
    limit = slots * resources.workers

    def tell(fault: str) -> None:
        if fault not in faults:
            progress.say(f"features of some runs are not made ahead: {fault}")
        faults.add(fault)

    try:
        room = _room(need)
        crews = _crews(list(room), token, list(wanted))
        _work(deque(makers(crews, room, limit)), limit, wanted, need, progress, tell)
        ray.get([_on(c.nodes[0], close).remote(token, [] if faults else c.lacking) for c in crews])
    except RayError as error:
        tell(explain(error)[0])
    progress.end_ahead()


def probe(token: str, node: str, keys: list[str]) -> tuple[str, list[str]]:
    """The node that was first to come to this cache folder with the token, and what is lacking in it."""
    path = _first(token)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not path.is_file():
            path.write_text(node, encoding="utf-8")
        return path.read_text(encoding="utf-8"), sorted(meeting.lacking(keys))


def close(token: str, made: list[str]) -> None:
    """Note what is made, and take the token away."""
    meeting.note(made)
    shutil.rmtree(_first(token).parent, ignore_errors=True)


def make(trees: list[dict[str, Any]], part: int, parts: int) -> Iterator[tuple[Any, ...]]:
    """A maker's work as fields of `workloads.ahead.Step`; the first says that there is a process."""
    yield ("", 0, 0, "")
    from workloads import ahead

    yield from (astuple(step) for step in ahead.make([from_tree(tree) for tree in trees], part, parts))


def makers(crews: Sequence[Crew], room: Mapping[str, int], limit: int) -> Iterator[Maker]:
    """The makers of every crew that lacks something: one or more, spread over its nodes.

    Of more crews than can work at once those with most room: trials run on no more nodes than that at once.
    """
    lacking = [crew for crew in crews if crew.lacking]
    lacking = sorted(lacking, key=lambda crew: -sum(room[node] for node in crew.nodes))[:limit]
    for crew in lacking:
        rounds = range(max(room[node] for node in crew.nodes))
        places = [node for number in rounds for node in crew.nodes if room[node] > number]
        places = places[: max(1, limit // len(lacking))]
        for part, node in enumerate(places):
            yield Maker(node=node, lacking=crew.lacking, part=part, parts=len(places))


def _room(need: Mapping[str, float]) -> dict[str, int]:
    """Node -> makers that it has room for, of the nodes that have any."""
    there = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    room = {
        name: min(int(has.get(kind, 0.0) / each) for kind, each in need.items() if each)
        for name, has in there.items()
    }
    return {name: places for name, places in room.items() if places}


def _crews(nodes: list[str], token: str, keys: list[str]) -> list[Crew]:
    """The nodes by the cache folder that they share."""
    answers = ray.get([_on(node, probe).remote(token, node, keys) for node in nodes])
    found: dict[str, Crew] = {}
    for node, (first, lacking) in zip(nodes, answers, strict=True):
        found.setdefault(first, Crew(lacking=lacking)).nodes.append(node)
    return list(found.values())


def _work(
    todo: deque[Maker],
    limit: int,
    wanted: Mapping[str, RunConfig],
    need: Mapping[str, float],
    progress: Progress,
    tell: Callable[[str], None],
) -> None:
    """Let at most `limit` makers work at once until all have ended."""
    # What the makers say -> when those were asked for that have said nothing yet.
    streams: dict[Any, float | None] = {}
    while todo or streams:
        while todo and len(streams) < limit:
            maker = todo.popleft()
            trees = [to_tree(wanted[key]) for key in maker.lacking]
            streams[_on(maker.node, make, need).remote(trees, maker.part, maker.parts)] = time.monotonic()
        ready = set(ray.wait(list(streams), timeout=1.0)[0])
        for stream in [known for known in streams if known in ready]:
            try:
                work, total, done, fault = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
            except RayError as error:
                del streams[stream]
                tell(explain(error)[0])
            else:
                streams[stream] = None
                progress.ahead(work, total, done)
                if fault:
                    tell(fault)
        for stream, since in list(streams.items()):
            if since is not None and time.monotonic() - since > _PATIENCE:
                ray.cancel(stream)
                del streams[stream]
                tell(f"a node had no CPU free in {_PATIENCE:.0f} s")
        progress.show()


def _on(node: str, function: Any, need: Mapping[str, float] | None = None) -> Any:
    """A function as a task of one node, which needs next to nothing by default.

    The process of one with needs ends with it, and gives back what it holds of a GPU.
    """
    place, given = NodeAffinitySchedulingStrategy(node, soft=False), need or {}
    cpus, gpus = given.get("CPU", 0.0), given.get("GPU", 0.0)
    remote: Any = ray.remote  # its hints know one kind of strategy
    return remote(
        num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=int(bool(need)), scheduling_strategy=place
    )(function)


def _first(token: str) -> Path:
    return cache_dir() / f".ahead-{token}" / "first"
