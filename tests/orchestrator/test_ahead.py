"""Features ahead of a sweep: records stay as they are, every cache folder is filled, the line says how far."""

import io
import re
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import yaml
from ray.exceptions import RayTaskError, WorkerCrashedError
from rich.console import Console

from orchestrator import ahead, sizing, sweep, tuner
from orchestrator.ahead import Crew, makers
from orchestrator.progress import Progress
from orchestrator.store import Store
from orchestrator.streams import expanded
from orchestrator.study import Resources, load
from orchestrator.trials import foreseen
from tests.data import writers
from tests.llava import checkpoints
from workloads import meeting
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.data.features import Features
from workloads.errors import UserError
from workloads.run import run

# Records to train on, and items; of the set whose last record has two pictures as well.
NUM, ITEMS, TWINS = 200, 6, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small checkpoint, a set of records with pictures, and one whose last record has two."""
    root = tmp_path_factory.mktemp("files")
    checkpoints.write(root / "llava")
    writers.llava_json(root / "good", NUM)
    writers.llava_json(root / "twins", TWINS)
    said = [{"from": "human", "value": "<image> <image> which ?"}, {"from": "gpt", "value": "both"}]
    twins = {"id": "twins", "image": ["0.png", "1.png"], "conversations": said}
    writers.dump(root / "twins" / "train.json", [*(writers.talk(i) for i in range(TWINS - 1)), twins])
    return root


def place(name):
    """Where a set's files are."""
    return {"train": f"{name}/train.json", "test": f"{name}/test.json", "images": f"{name}/images"}


@pytest.fixture
def study(files, tmp_path):
    """A function that writes a study of five steps; returns its path."""

    def write(name="tiny", cached=True, **parts):
        domains = {"things": {"format": "llava_json", **place("good")}}
        recipe = {
            "model": {"name_or_path": str(files / "llava")},
            "data": {"source": "files", "root": str(files), "domains": domains, "mixture": {"things": 1}},
            "adapter": {"name": "lora", "rank": 2},
            "optim": {"global_batch": 40, "lr": 0.002},
            "eval": {"samples": ITEMS, "max_new_tokens": 4},
            "execution": {"report_every": 1, "feature_cache": cached},
        }
        recipe["data"]["samples"] = 0
        (tmp_path / f"{name}_recipe.yaml").write_text(yaml.safe_dump(recipe))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"recipe": f"{name}_recipe.yaml", "arms": ["lora"], **parts}))
        return path

    return write


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Three raylets, the first two with one cache folder; yields their address and the two folders."""
    from ray.cluster_utils import Cluster

    places = [tmp_path / name for name in ("shared", "shared", "own")]
    options = [{"num_cpus": 1, "env_vars": {ENVIRONMENT_KEY: str(each)}} for each in places]
    for key, value in {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(key, value)
    cluster = Cluster(initialize_head=True, head_node_args={**options[0], "include_dashboard": False})
    try:
        for each in options[1:]:
            cluster.add_node(**each)
        yield cluster.address, places[0], places[2]
    finally:
        cluster.shutdown()


def filled(cache):
    """Of every pool with features: number of samples, of rows that are there, and bytes of one."""
    stamps = {path: np.fromfile(path, "<i8") for path in cache.glob("features/*/*/stamps")}
    return sorted(
        (len(found), np.count_nonzero(found), path.with_name("rows").stat().st_size // len(found))
        for path, found in stamps.items()
    )


def test_every_cache_folder_is_filled_and_a_run_finds_there_what_it_would_make(
    study, nodes, tmp_path, monkeypatch
):
    address, *caches = nodes
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "driver"))
    other = {f"data.domains.things.{key}": value for key, value in place("twins").items()}
    made = load(str(study(arms={"twins": {"method": "lora", "set": other}, "lora": {}})))
    configs = {trial.arm: trial.config for trial in expanded(made)}
    twins, lora = configs["twins"], configs["lora"]
    console = Console(file=io.StringIO(), width=200)
    ray.init(address=address, log_to_driver=False)
    try:
        ahead.build(
            [*configs.values()], made.resources, 4, Progress(console, total=2, done=0), is_local=False
        )
    finally:
        ray.shutdown()
    out = console.file.getvalue()
    # Two folders: each picture twice. The last one of the twins is where its pool is given up.
    total = 2 * (NUM + ITEMS + TWINS + ITEMS)
    # A maker that comes late finds some pools vetted by those that needed them.
    done, of = map(int, re.findall(r"pictures: (\d+)/(\d+) images, ", out)[-1])
    assert 0 < done == of <= total
    assert re.findall(r"features: \d+/(\d+) images, ", out)[-1] == str(total)
    fault = "execution.feature_cache: true is not allowed; twins has 2 images, and features are kept of exactly one"
    assert out.count(f"features of some runs are not made ahead: {fault}") == 1
    assert out.count("not made ahead") == 1
    (width,) = {width for cache in caches for _, _, width in filled(cache)}
    for cache in caches:
        there = [(size, rows) for size, rows, _ in filled(cache) if size != TWINS]
        assert there == [(ITEMS, ITEMS), (ITEMS, ITEMS), (NUM, NUM)]
        assert not [*cache.glob(".ahead-*")]
    assert not (tmp_path / "driver" / "features").exists()
    # What the plan foretells is what its features take.
    lines = sizing.sizing(load(str(study("planned", seeds=[7, 8])))).lines
    size = (NUM + ITEMS) * width / 1e6
    assert any(line.endswith(f"; features of {NUM + ITEMS} images: {size:.1f} MB") for line in lines)
    alone = replace(lora, execution=replace(lora.execution, feature_cache=False))
    results = {"alone": run(alone, lambda metrics, folder: None, tmp_path / "alone")}
    monkeypatch.setattr(Features, "write", None)
    for number, cache in enumerate(caches):
        monkeypatch.setenv(ENVIRONMENT_KEY, str(cache))
        results[number] = run(lora, lambda metrics, folder: None, tmp_path / str(number))
    with pytest.raises(UserError, match=re.escape(fault)):
        run(twins, lambda metrics, folder: None, tmp_path / "twins")
    for part in ("scores", "train_loss", "routing", "stream_hash", "eval_hash", "sample_shares"):
        first, *others = (getattr(result, part) for result in results.values())
        assert others == [first, first], part
    said = [(tmp_path / str(name) / "predictions.jsonl").read_bytes() for name in results]
    assert said == [said[0]] * 3


def test_a_sweep_makes_features_of_what_is_to_do_before_the_first_trial(study, tmp_path, monkeypatch):
    made = load(str(study(seeds=[3, 4])))
    trials, store, seen = expanded(made), Store(tmp_path / "studies"), []
    monkeypatch.setattr(sweep.cluster, "connected", lambda *_: nullcontext(2))
    monkeypatch.setattr(
        ahead, "build", lambda configs, *_, is_local: seen.append(([c.seed for c in configs], is_local))
    )
    monkeypatch.setattr(tuner, "run_list", lambda study, todo, *_: seen.append(len(todo)))
    finished = trials[0].fingerprint
    monkeypatch.setattr(store, "finished", lambda key: key == finished)
    with store.only_driver("tiny") as folder, Progress(Console(file=io.StringIO()), 2, 1) as progress:
        ledger = sweep.open_ledger(folder, made, trials, store, "")
        sweep._train(made, trials, 1, store, ledger, progress, sweep.Options())
    assert seen == [([4], True), 1]


def test_of_a_search_every_arm_is_foreseen_with_every_seed(study):
    search = {"space": "learning_rate", "trials_per_arm": 3, "seeds": [7, 8]}
    made = load(str(study(arms=["lora", "mole"], search=search)))
    pairs = [(config.adapter.name, config.seed) for config in foreseen(made, [])]
    assert pairs == [("lora", 7), ("lora", 8), ("mole", 7), ("mole", 8)]


def test_of_a_list_what_is_to_do_is_foreseen_and_stages_look_up_alike(study):
    made = load(str(study(seeds=[0, 1])))
    assert [config.seed for config in foreseen(made, expanded(made)[1:])] == [1]
    staged = load(str(study("staged", stream={"stages": ["things"]})))
    assert len(meeting.distinct(foreseen(staged, expanded(staged)))) == 1


def test_nodes_of_one_cache_folder_are_told_by_who_came_first_and_notes_tell_what_is_made(
    tmp_path, monkeypatch
):
    found = []
    for node, name in (("n0", "a"), ("n1", "b"), ("n2", "a")):
        monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / name))
        found.append(ahead.probe("token", node, ["x", "y"]))
    assert found == [("n0", ["x", "y"]), ("n1", ["x", "y"]), ("n0", ["x", "y"])]
    ahead.close("token", ["y"])
    assert ahead.probe("other", "n2", ["x", "y"]) == ("n2", ["x"])
    assert not [*(tmp_path / "a").glob(".ahead-token*")]
    assert (meeting.lacking(["y"]), meeting.lacking([])) == (set(), set())
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "b"))
    assert meeting.lacking(["y"]) == {"y"}


@pytest.mark.parametrize(
    ("limit", "shared", "own"),
    [(1, ["a"], []), (2, ["a"], ["c"]), (4, ["a", "b"], ["c"]), (9, ["a", "b", "a"], ["c"])],
)
def test_makers_are_spread_over_the_nodes_of_every_folder_that_has_its_turn(limit, shared, own):
    crews = [Crew(nodes=["c"], lacking=["y"]), Crew(nodes=["a", "b"], lacking=["x"])]
    crews += [Crew(nodes=["d"], lacking=[])]
    found = list(makers(crews, {"a": 2, "b": 1, "c": 1, "d": 4}, limit))
    assert [maker.node for maker in found] == [*shared, *own]
    for key, places in (("x", shared), ("y", own)):
        mine = [maker for maker in found if maker.lacking == [key]]
        assert [maker.part for maker in mine] == list(range(len(places)))
        assert [maker.parts for maker in mine] == [len(places)] * len(places)


class Nodes:
    """Stands in for Ray with one node: `says` has what each maker says; an exception is raised."""

    def __init__(self, says, lacking):
        self.says, self.lacking, self.alive, self.most, self.noted = deque(says), lacking, 0, 0, None
        self.cancelled = []

    def nodes(self):
        return [{"NodeID": "n0", "Alive": True, "Resources": {"CPU": 4.0}}]

    def on(self, node, function, need=None):
        return SimpleNamespace(remote=lambda *words: getattr(self, function.__name__)(*words))

    def probe(self, token, node, keys):
        return node, self.lacking(keys)

    def close(self, token, keys):
        self.noted = keys

    def make(self, trees, part, parts):
        self.alive += 1
        self.most = max(self.most, self.alive)
        says = self.says.popleft()
        return None if says is None else self.ended(says)

    def ended(self, says):
        try:
            yield from says
        finally:
            self.alive -= 1

    def get(self, value):
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, streams, timeout):
        return [each for each in streams if each is not None], []

    def cancel(self, stream):
        self.cancelled.append(stream)


@pytest.fixture
def pretend(monkeypatch, study):
    """A function that makes features with makers that are none; returns what is printed, and the node."""
    configs = [trial.config for trial in expanded(load(str(study(seeds=[0, 1]))))]

    def build(says, slots=2, lacking=list, is_local=False):
        nodes = Nodes(says, lacking)
        monkeypatch.setattr(ahead, "ray", nodes)
        monkeypatch.setattr(ahead, "_on", nodes.on)
        console = Console(file=io.StringIO(), width=200)
        ahead.build(configs, Resources(), slots, Progress(console, total=1, done=0), is_local)
        return console.file.getvalue().splitlines(), nodes

    return build


def steps(total, *done, fault=""):
    said = [("features", 0, number, "") for number in done]
    return [("", 0, 0, ""), ("", 0, 0, fault), ("features", total, 0, ""), *said]


def test_the_line_adds_up_what_makers_say_and_what_is_made_is_noted(pretend):
    lines, nodes = pretend([steps(30, 10, 20), steps(12, 12)])
    assert [line.split(" images,")[0] for line in lines] == ["features: 42/42"]
    assert (nodes.most, nodes.alive, len(nodes.noted)) == (2, 0, 2)


def test_nothing_is_said_when_all_is_there_and_on_this_machine_ray_is_not_asked(
    pretend, monkeypatch, tmp_path
):
    assert pretend([steps(0), steps(0)])[0] == []
    lines, nodes = pretend([], lacking=lambda keys: [])
    assert (lines, nodes.most) == ([], 0)
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "cache"))
    lines, nodes = pretend([steps(5, 5), steps(5, 5)], is_local=True)
    assert lines[0].startswith("features: 10/10")
    meeting.note(nodes.noted)
    monkeypatch.setattr(Nodes, "nodes", None)
    assert pretend([], is_local=True)[0] == []


def test_faults_are_told_once_and_at_once_and_nothing_is_noted_then(pretend):
    lines, nodes = pretend([steps(30, 30, fault="x is bad"), steps(12, 12, fault="x is bad")])
    assert lines[0] == "features of some runs are not made ahead: x is bad"
    assert lines[1].startswith("features: 42/42 images")
    assert (len(lines), nodes.noted) == (2, [])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RayTaskError("make", "Traceback", UserError("y is bad\nsecond line")), "y is bad"),
        (WorkerCrashedError(), "WorkerCrashedError: "),
    ],
)
def test_a_maker_that_fails_leaves_its_part_to_the_trials_and_the_others_go_on(error, words, pretend):
    lines, nodes = pretend([[*steps(30, 10), error], steps(12, 12)])
    assert lines[0].startswith(f"features of some runs are not made ahead: {words}")
    assert lines[1].startswith("features: 22/42 images")
    assert (len(lines), nodes.noted) == (2, [])


def test_a_maker_that_cannot_start_is_not_waited_for(pretend, monkeypatch):
    monkeypatch.setattr(ahead, "_PATIENCE", -1.0)
    lines, nodes = pretend([None, steps(12, 12)])
    assert lines[0].startswith("features of some runs are not made ahead: a node had no CPU free in ")
    assert lines[1].startswith("features: 12/12 images")
    assert nodes.cancelled == [None]
