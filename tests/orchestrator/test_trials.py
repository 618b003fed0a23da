"""A study expands into every arm, point and seed, arms on top of profiles, and equal runs only once."""

import itertools

import pytest
import yaml

from orchestrator.study import from_tree
from orchestrator.trials import distinct, fixed, flat_params, label, put, search_points
from search_spaces.mixtures import MIXTURES
from workloads.config import to_tree
from workloads.errors import UserError


@pytest.fixture
def trials(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def make(profile: str = "full", **tree):
        return fixed(from_tree({"recipe": "recipe.yaml", **tree}, "tiny", profile, tmp_path))

    return make


def test_every_arm_meets_every_point_and_seed_with_whole_replications_first(trials):
    got = trials(arms=["lora", "mole"], grid={"optim.lr": [0.1, 0.2], "data.samples": [4, 8]}, seeds=[5, 3])
    cells = [(t.seed, t.arm.split("@")[0], t.point["optim.lr"], t.point["data.samples"]) for t in got]
    assert cells == list(itertools.product([5, 3], ["lora", "mole"], [0.1, 0.2], [4, 8]))
    for trial in got:
        assert trial.config.seed == trial.seed
        assert trial.config.optim.lr == trial.point["optim.lr"]
        assert trial.config.data.samples == trial.point["data.samples"]
    assert len({t.fingerprint for t in got}) == len(got)


def test_an_arm_outranks_the_profile_and_the_profile_outranks_the_study(trials):
    tree = {
        "set": {"optim.lr": 0.1, "data.samples": 8, "adapter.rank": 1},
        "arms": {"a": {"method": "lora", "set": {"optim.lr": 0.3}}},
        "profiles": {"smoke": {"set": {"optim.lr": 0.2, "data.samples": 4}}},
    }
    (full,), (smoke,) = trials(**tree), trials("smoke", **tree)
    assert (full.config.optim.lr, full.config.data.samples) == (0.3, 8)
    assert (smoke.config.optim.lr, smoke.config.data.samples) == (0.3, 4)
    assert to_tree(full.config)["adapter"]["rank"] == 1


def test_a_mixture_replaces_the_recipes_and_may_be_named(trials):
    got = trials(arms=["lora"], grid={"data.mixture": ["document_only", {"general": 2}]})
    assert [t.config.data.mixture for t in got] == [MIXTURES["document_only"], {"general": 2.0}]
    assert [t.arm for t in got] == ["lora@mixture=document_only", "lora@mixture=general:2"]


def test_settings_of_the_recipes_method_stay_with_that_method(trials):
    lora, mole = trials(arms=["lora", "mole"])
    assert to_tree(lora.config)["adapter"]["rank"] == 2
    assert "rank" not in to_tree(mole.config)["adapter"]


def test_equal_configurations_are_one_run(trials):
    got = trials(arms={"a": {"method": "lora"}, "b": {"method": "lora", "set": {"adapter.rank": 2}}})
    assert [t.arm for t in got] == ["a", "b"]
    assert len(distinct(got)) == 1


def test_workers_and_slots_do_not_change_what_a_run_is(trials):
    (one,), (two,) = trials(arms=["lora"]), trials(arms=["lora"], resources={"workers": 2, "slots": 1})
    assert two.config.execution.workers == 2
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim.lrr": 1}, ("optim.lrr", "did you mean 'lr'")),
        ({"optm.lr": 1}, ("optm", "did you mean 'optim'")),
        ({"adapter.rank": 0}, ("adapter.rank", "0")),
        ({"adapter.rnk": 2}, ("adapter.rnk", "did you mean 'rank'")),
        ({"data.mixture": "all_equl"}, ("data.mixture", "did you mean 'all_equal'")),
        ({"data.mixture": {"generl": 1}}, ("data.mixture", "data.mixture.generl", "did you mean 'general'")),
        ({"data.mixture": {"general": -1}}, ("data.mixture.general", "-1")),
        ({"data.mixture": {"general": 0}}, ("data.mixture", "above 0")),
        ({"data.samples": 10**9}, ("data.samples", str(10**9))),
        ({"data.source": "pockt"}, ("data.source", "did you mean 'pocket'")),
        ({"eval.samples": 10**9}, ("eval.samples", str(10**9))),
        ({"eval.domains": ["generl"]}, ("eval.domains", "did you mean 'general'")),
        ({"optim.lr.x": 1}, ("optim.lr.x", "single value")),
        ({"optim.lr": float("nan")}, ("optim.lr", "finite")),
        ({"init_from": 3}, ("init_from", "3")),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_that_names_it(trials, settings, words):
    with pytest.raises(UserError) as caught:
        trials(arms=["lora"], set=settings)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_an_arm_without_experts_is_refused_with_its_name(trials):
    with pytest.raises(UserError, match=r"arm none: adapter.num_experts: 0"):
        trials(arms={"none": {"method": "mole", "set": {"adapter.num_experts": 0}}})


def test_a_search_has_equal_trials_for_every_arm(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = {"space": "learning_rate", "trials_per_arm": 3, "seeds": [9, 8]}
    tree = {"recipe": "recipe.yaml", "arms": ["lora", "mole"], "search": search}
    points = search_points(from_tree(tree, "tiny", "full", tmp_path))
    counts = {arm: sum(t.arm.startswith(arm) for t in points) for arm in ("lora", "mole")}
    assert counts == {"lora": 6, "mole": 6}


def test_a_search_may_take_in_each_methods_own_settings(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = {"space": "learning_rate", "method_space": True, "trials_per_arm": 1}
    tree = {"recipe": "recipe.yaml", "arms": ["lora", "mole"], "search": search}
    lora, mole = search_points(from_tree(tree, "tiny", "full", tmp_path))
    assert set(lora.point) == {"optim.lr", "adapter.rank"}
    assert set(mole.point) == {"optim.lr", "adapter.num_experts", "adapter.balance_weight"}


def test_a_label_shows_what_varies():
    assert label("mole", {}) == "mole"
    assert (
        label("mole", {"optim.lr": 0.002, "data.mixture": "all_equal"}) == "mole@lr=0.002,mixture=all_equal"
    )


def test_put_keeps_its_neighbours():
    tree = {"optim": {"lr": 1, "clip": 2}}
    put(tree, "optim.lr", 3)
    put(tree, "data.samples", 4)
    assert tree == {"optim": {"lr": 3, "clip": 2}, "data": {"samples": 4}}


def test_parameters_are_dotted_texts():
    assert flat_params({"a": {"b": {"c": 1}, "d": []}, "e": "x"}) == {"a.b.c": "1", "a.d": "[]", "e": "x"}
