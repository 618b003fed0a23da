"""A stream expands into chains of runs whose equal beginnings are one run; waiting ends with the stage before."""

import json
import threading
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.commands.status import detail
from orchestrator.plan import planned
from orchestrator.store import Store
from orchestrator.streams import expanded, wait
from orchestrator.study import from_tree
from orchestrator.trial import resolve, spec_of
from orchestrator.trials import distinct, row
from workloads.config import to_tree
from workloads.errors import UserError

TASKS = ["general", "document", "biomedical"]
RECIPE = {
    "adapter": {"name": "lora", "rank": 2},
    "data": {"samples": 8},
    "eval": {"samples": 4, "split": "val"},
}
STAGES = [*TASKS, {"name": "mix", "mixture": {"general": 1.0, "document": 0.5}}]
EXPLICIT = ["document", "general", "mix", "biomedical"]


@st.composite
def forms(draw):
    """Entries of `orders` for the four stages; all permutations come last, since they hold the others."""
    some = ["given", "reversed", {"sampled": 3, "seed": 1}, EXPLICIT]
    chosen = draw(st.lists(st.sampled_from(some), max_size=4, unique_by=str))
    return [*chosen, {"all": 24}] if not chosen or draw(st.booleans()) else chosen


@pytest.fixture(scope="module")
def expand(tmp_path_factory):
    """A function that expands a study with a stream."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def make(**tree):
        stream = {"stages": TASKS, "orders": ["given"], **tree.pop("stream", {})}
        arms = tree.pop("arms", {"lora": {}})
        return expanded(
            from_tree({"recipe": "recipe.yaml", "arms": arms, "stream": stream, **tree}, "t", "full", folder)
        )

    return make


def _chains(trials):
    """(arm, seed, order) -> its trials in the order of the study; an arm without orders is left out."""
    out = {}
    for trial in trials:
        if trial.spot.order:
            out.setdefault((trial.arm, trial.seed, trial.spot.order), []).append(trial)
    return out


slow = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@slow
@given(
    orders=forms(),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
    rank=st.integers(2, 3),
)
def test_chains_link_share_their_beginnings_and_are_as_many_as_a_slow_count_says(expand, orders, seeds, rank):
    arms = {
        "lora": {},
        "other": {"method": "lora", "set": {"adapter.rank": rank}},
        "alone": {"method": "lora", "stream": "alone"},
    }
    trials = expand(arms=arms, seeds=seeds, stream={"stages": STAGES, "orders": orders})
    names = [*TASKS, "mix"]
    seen = set()
    for (arm, seed, _), chain in _chains(trials).items():
        assert sorted(trial.spot.task for trial in chain) == sorted(names)
        assert [trial.spot.stage for trial in chain] == [1, 2, 3, 4]
        before = ""
        for trial in chain:
            assert trial.config.init_from == before
            assert trial.config.continual.task == trial.spot.task
            assert trial.config.seed == seed
            mix = {"general": 1.0, "document": 0.5} if trial.spot.task == "mix" else {trial.spot.task: 1.0}
            assert trial.config.data.mixture == mix
            before = trial.fingerprint
        # What a run is: the settings of its arm, the seed, and the stages up to it.
        own = rank if arm == "other" else 2
        tasks = tuple(trial.spot.task for trial in chain)
        seen |= {(own, seed, tasks[:k]) for k in (1, 2, 3, 4)}
    seen |= {(2, seed, (name,)) for seed in seeds for name in names}
    assert len(distinct(trials)) == len(seen)
    places = {key: i for i, key in enumerate(distinct(trials))}
    assert all(places[t.config.init_from] < places[t.fingerprint] for t in trials if t.config.init_from)
    assert [t.seed for t in trials] == [seed for seed in seeds for t in trials if t.seed == seed]
    for seed in seeds:
        levels = [max(1, trial.spot.stage) for trial in trials if trial.seed == seed]
        assert levels == sorted(levels)


@slow
@given(orders=forms())
def test_one_more_order_changes_no_fingerprint_that_is_there(expand, orders):
    before = _chains(expand(stream={"stages": STAGES, "orders": orders[:-1] or ["given"]}))
    after = _chains(
        expand(stream={"stages": STAGES, "orders": orders if orders[:-1] else ["given", {"all": 24}]})
    )
    assert len(after) > len(before)
    for key, chain in before.items():
        assert [trial.fingerprint for trial in after[key]] == [trial.fingerprint for trial in chain]


def test_a_first_stage_is_the_same_for_every_regulariser_and_for_a_task_alone(expand):
    ewc = {"method": "lora", "set": {"continual.regulariser": "ewc", "continual.weight": 10.0}}
    replay = {"method": "lora", "set": {"continual.replay": "reservoir", "continual.replay_share": 0.1}}
    arms = {"lora": {}, "ewc": ewc, "replay": replay, "alone": {"method": "lora", "stream": "alone"}}
    trials = expand(arms=arms)
    by_arm = {arm: [t for t in trials if t.arm == arm] for arm in arms}
    for stage in (0, 1, 2):
        found = {by_arm[arm][stage].fingerprint for arm in ("lora", "ewc", "replay")}
        assert len(found) == (1 if stage == 0 else 3)
    assert by_arm["alone"][0].fingerprint == by_arm["lora"][0].fingerprint
    assert {t.config.init_from for t in by_arm["alone"]} == {""}
    assert [(t.spot.order, t.spot.stage, t.spot.task) for t in by_arm["alone"]] == [
        ("", 1, task) for task in TASKS
    ]


def test_a_joint_arm_is_one_run_on_everything(expand):
    trials = expand(
        arms={"lora": {}, "joint": {"method": "lora", "stream": "joint"}}, stream={"stages": STAGES}
    )
    (joint,) = [trial for trial in trials if trial.arm == "joint"]
    assert joint.config.data.mixture == {"general": 2.0, "document": 1.5, "biomedical": 1.0}
    assert (joint.config.continual.task, joint.config.init_from, joint.spot.stage) == ("", "", 0)


def test_a_method_is_told_the_tasks_in_the_order_that_it_learns_them_in(expand):
    trials = expand(
        arms={"o_lora": {}, "alone": {"method": "o_lora", "stream": "alone"}},
        stream={"orders": ["given", "reversed"]},
    )
    told = {(t.arm, t.spot.order, t.spot.task): to_tree(t.config)["adapter"]["tasks"] for t in trials}
    for task in TASKS:
        assert told["o_lora", "given", task] == TASKS
        assert told["o_lora", "reversed", task] == TASKS[::-1]
        assert told["alone", "", task] == [task, *(other for other in TASKS if other != task)]
    chosen = [*TASKS[::-1], "more"]
    fixed = expand(arms={"o_lora": {"set": {"adapter.tasks": chosen}}})
    assert all(to_tree(t.config)["adapter"]["tasks"] == chosen for t in fixed)


def test_a_run_of_all_stages_at_once_is_told_its_domains_as_tasks(expand):
    joint = {"joint": {"method": "moa", "stream": "joint"}}
    mixed = [{"name": "mix", "mixture": {"document": 1.0, "general": 0.5, "biomedical": 0.0}}, "general"]
    (trial,) = expand(arms=joint, stream={"stages": mixed})
    assert to_tree(trial.config)["adapter"]["tasks"] == ["document", "general"]
    (plain,) = expand(arms=joint)
    assert to_tree(plain.config)["adapter"]["tasks"] == TASKS
    chosen = {"joint": {**joint["joint"], "set": {"adapter.tasks": [*TASKS[::-1], "more"]}}}
    (trial,) = expand(arms=chosen, stream={"stages": mixed})
    assert to_tree(trial.config)["adapter"]["tasks"] == [*TASKS[::-1], "more"]


TOLD = ["more", "mtl_lora"]


@pytest.mark.parametrize("method", TOLD)
def test_a_stage_counts_what_it_is_not_told_of_as_its_own_task(expand, method):
    mixed = [{"name": "mix", "mixture": {"document": 1.0, "general": 0.5}}]
    assert len(expand(arms={method: {}}, stream={"stages": mixed})) == 1


@pytest.mark.parametrize("method", TOLD)
def test_what_is_answered_without_a_stage_has_to_be_one_of_the_tasks(expand, method):
    """biomedical is scored, since all domains are, and never trained."""
    arms = {"all_at_once": {"method": method, "stream": "joint"}}
    stream = {"stages": ["general", "document"]}
    with pytest.raises(UserError) as caught:
        expand(arms=arms, stream=stream)
    assert str(caught.value) == (
        f"arm all_at_once: eval.domains: 'biomedical' is not allowed; {method} is told each sample's task, "
        "one of adapter.tasks: general, document; name it there or leave it out"
    )
    named = {"all_at_once": {**arms["all_at_once"], "set": {"adapter.tasks": TASKS}}}
    left_out = {"all_at_once": {**arms["all_at_once"], "set": {"eval.domains": ["document"]}}}
    for mended in (named, left_out):
        assert len(expand(arms=mended, stream=stream)) == 1


@pytest.mark.parametrize("method", [*TOLD, "moa"])
def test_what_is_trained_without_a_stage_has_to_be_one_of_the_tasks(expand, method):
    arms = {"joint": {"method": method, "stream": "joint", "set": {"adapter.tasks": ["general", "mix"]}}}
    stages = ["general", {"name": "mix", "mixture": {"document": 1.0}}]
    with pytest.raises(
        UserError, match=r"^arm joint: data.mixture: 'document' is not allowed; .*general, mix$"
    ):
        expand(arms=arms, stream={"stages": stages}, set={"eval.domains": ["general"]})


def test_who_goes_without_tasks_at_inference_is_scored_on_what_was_never_trained(expand):
    arms = {"joint": {"method": "moa", "stream": "joint"}, "o_lora": {"stream": "joint"}}
    assert len(expand(arms=arms, stream={"stages": ["general", "document"]})) == 2


def test_a_grid_makes_chains_of_its_own(expand):
    trials = expand(grid={"optim.lr": [0.1, 0.2]}, stream={"orders": ["given", "reversed"]})
    chains = _chains(trials)
    assert set(chains) == {
        (f"lora@lr={lr}", 0, order) for lr in (0.1, 0.2) for order in ("given", "reversed")
    }
    for (arm, _, _), chain in chains.items():
        assert {trial.config.optim.lr for trial in chain} == {float(arm.split("=")[1])}
    assert len(distinct(trials)) == 12


def test_a_trial_comes_back_whole_from_its_plain_values(expand):
    for trial in expand(arms={"o_lora": {}}, grid={"optim.lr": [0.1]}):
        assert resolve(json.loads(json.dumps(spec_of(trial)))) == trial


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"stream": {"stages": ["general", "documnt"]}}, ("stream.stages", "'documnt'", "did you mean 'document'")),
        ({"stream": {"stages": [{"name": "m", "mixture": {"generl": 1}}]}}, ("unknown task 'generl'",)),
        ({"search": {"space": "learning_rate"}}, ("search", "with `stream`")),
        ({"arms": {"lora": {"stream": "jont"}}}, ("arms.lora.stream", "did you mean 'joint'")),
        ({"arms": {"lora": {"stream": ["joint"]}}}, ("arms.lora.stream", "['joint']")),
        ({"set": {"data.mixture": "all_equal"}}, ("set.data.mixture", "stages")),
        ({"grid": {"init_from": ["0" * 16]}}, ("grid.init_from", "stages")),
        ({"arms": {"lora": {"set": {"continual.task": "x"}}}}, ("arms.lora.set.continual.task", "'x'")),
        (
            {"arms": {"o_lora": {"set": {"adapter.tasks": ["general", "document"]}}}},
            ("arm o_lora", "adapter.tasks", "'biomedical' is missing"),
        ),
        ({"set": {"adapter.tasks": TASKS}}, ("arm lora", "adapter.tasks")),
        ({"set": {"continual.weight": -1}}, ("arm lora", "continual.weight")),
        ({"comparison": {"before": "bse"}}, ("comparison.before", "'bse'")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(expand, tree, words):
    with pytest.raises(UserError) as caught:
        expand(**tree)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_an_arm_has_no_part_in_a_stream_that_is_not_there(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    tree = {"recipe": "recipe.yaml", "arms": {"lora": {"stream": "joint"}}}
    with pytest.raises(UserError, match=r"arms.lora.stream: 'joint'.*the study has no `stream`"):
        from_tree(tree, "t", "full", tmp_path)


def test_a_profile_may_change_the_orders_alone(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    stream = {"stages": TASKS, "orders": ["given", "reversed"]}
    profiles = {"smoke": {"stream": {"orders": ["reversed"]}}}
    tree = {"recipe": "recipe.yaml", "arms": {"lora": {}}, "stream": stream, "profiles": profiles}
    full, smoke = (from_tree(tree, "t", profile, tmp_path) for profile in ("full", "smoke"))
    assert list(full.stream.orders) == ["given", "reversed"]
    assert (list(smoke.stream.orders), smoke.stream.names) == (["reversed"], tuple(TASKS))
    assert len(planned(full)) == 6


class _Study:
    """A study.json with one chain, whose stages are given states by hand."""

    def __init__(self, root, trials):
        self.store, self.trials = Store(root), trials
        self.states = ["pending"] * len(trials)
        self.folder = self.store.study_folder("t")
        self.folder.mkdir(parents=True)
        self.write()

    def write(self):
        rows = [
            {
                "arm": t.arm,
                "seed": t.seed,
                "order": t.spot.order,
                "stage": t.spot.stage,
                "task": t.spot.task,
                "status": state,
            }
            for t, state in zip(self.trials, self.states, strict=True)
        ]
        (self.folder / "study.json").write_text(json.dumps({"trials": rows}))

    def finish(self, trial):
        folder = self.store.run_folder(trial.fingerprint)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")


def test_a_stage_waits_until_the_one_before_is_finished_and_a_first_one_does_not(expand, tmp_path):
    first, second, _ = expand()
    study = _Study(tmp_path, [first, second])
    assert not wait(first, study.store, "t")
    ended = []
    thread = threading.Thread(target=lambda: ended.append(wait(second, study.store, "t")), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert ended == []
    study.finish(first)
    thread.join(timeout=10)
    assert ended == [True]
    assert not wait(second, study.store, "t")


def test_a_stage_that_failed_ends_the_waiting_of_all_after_it_by_its_name(expand, tmp_path):
    trials = expand()
    study = _Study(tmp_path, trials)
    study.finish(trials[0])
    study.states = ["finished", "failed", "failed"]
    study.write()
    with pytest.raises(UserError, match=r"^stage 2 \(document\) of order given failed$"):
        wait(trials[2], study.store, "t")


def test_status_shows_where_a_run_stands_in_its_stream_and_only_there(expand):
    trials = [row(trial) for trial in expand()]
    columns = [column.header for column in detail({"name": "t", "trials": trials}).columns]
    assert columns[2:5] == ["order", "stage", "task"]
    for line in trials:
        for key in ("order", "stage", "task"):
            del line[key]
    assert "stage" not in [column.header for column in detail({"name": "t", "trials": trials}).columns]
