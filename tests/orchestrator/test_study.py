"""A study file is read strictly: a mistake is one line that names it, and profiles change only their part."""

import pytest

from orchestrator.study import Study, find, flat, from_tree
from workloads.errors import UserError

RECIPE = {"adapter": {"name": "lora"}}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("adapter: {name: lora}\n")

    def make(profile: str = "full", name: str = "tiny", **tree) -> Study:
        return from_tree({"recipe": "recipe.yaml", "arms": {"lora": {}}, **tree}, name, profile, tmp_path)

    return make


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sed": [1]}, ("sed", "did you mean 'seeds'")),
        ({"arms": {"lora": {"sett": {}}}}, ("arms.lora.sett", "did you mean 'set'")),
        ({"arms": {"x": {"method": "lorra"}}}, ("arms.x.method", "'lorra'", "did you mean 'lora'")),
        ({"arms": ["mole", "lorra"]}, ("arms.lorra.method", "did you mean 'lora'")),
        ({"arms": []}, ("arms", "[]")),
        ({"arms": {"<script>": {"method": "lora"}}}, ("arms", "<script>")),
        ({"seeds": [0, 0]}, ("seeds", "[0, 0]")),
        ({"seeds": [-1]}, ("seeds", "-1")),
        ({"seeds": 3}, ("seeds", "3")),
        ({"seeds": [True]}, ("seeds", "True")),
        ({"grid": {"optim.lr": 0.1}}, ("grid.optim.lr", "0.1", "list")),
        ({"grid": {"optim.lr": []}}, ("grid.optim.lr", "[]")),
        ({"recipe": "pockett"}, ("recipe", "'pockett'")),
        ({"recipe": "nowhere.yaml"}, ("nowhere.yaml", "no such file")),
        ({"schema_version": 7}, ("schema_version", "7")),
        ({"resources": {"slot": 2}}, ("resources.slot", "did you mean 'slots'")),
        ({"resources": {"workers": 0}}, ("resources.workers", "0")),
        ({"resources": {"workers": "two"}}, ("resources.workers", "'two'", "int")),
        ({"resources": {"slots": -1}}, ("resources.slots", "-1")),
        ({"search": {"space": "learning_rat"}}, ("search.space", "did you mean 'learning_rate'")),
        ({"search": {"scheduler": "asho"}}, ("search.scheduler", "did you mean 'asha'")),
        ({"search": {"scheduler": "asha"}}, ("search.metric", "'score'", "loss")),
        ({"search": {"space": {"optim.lr": {"logunifrom": [1, 2]}}}}, ("logunifrom", "did you mean 'loguniform'")),
        ({"search": {"space": {"optim.lr": {"loguniform": [0, 1]}}}}, ("optim.lr.loguniform", "low > 0")),
        ({"search": {"space": {"optim.lr": {"uniform": [1]}}}}, ("optim.lr.uniform", "2 numbers")),
        ({"search": {"space": {"optim.lr": {"choice": []}}}}, ("optim.lr.choice", "[]")),
        ({"search": {"trials_per_arm": 0}}, ("search.trials_per_arm", "0")),
        ({"comparison": {"mix": "lorra"}}, ("comparison.mix", "did you mean 'lora'")),
        ({"comparison": {"solo": {"general": "x"}}}, ("comparison.solo", "'x'")),
        ({"comparison": {"mixx": "lora"}}, ("comparison.mixx", "did you mean 'mix'")),
        ({"profiles": {"smoke": {"arms": {}}}}, ("profiles.smoke.arms", "unknown key")),
        ({"set": [1]}, ("set", "[1]")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(read, tree, words):
    with pytest.raises(UserError) as caught:
        read(**tree)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_an_unknown_profile_names_the_ones_there_are(read):
    with pytest.raises(UserError, match=r"profile: 'smok'.*did you mean 'smoke'"):
        read(profile="smok", profiles={"smoke": {}})


def test_a_name_that_cannot_be_a_folder_and_an_experiment_is_refused(read):
    with pytest.raises(UserError, match="study name: '../x'"):
        read(name="../x")


def test_a_profile_changes_what_it_names_and_nothing_else(read):
    tree = {
        "set": {"data": {"samples": 10}, "optim.lr": 0.5},
        "seeds": [0, 1],
        "resources": {"workers": 2, "slots": 1},
        "profiles": {"smoke": {"set": {"data.samples": 3}, "seeds": [7], "resources": {"slots": 2}}},
    }
    full, smoke = read(**tree), read(profile="smoke", **tree)
    assert full.set == {"data.samples": 10, "optim.lr": 0.5}
    assert smoke.set == {"data.samples": 3, "optim.lr": 0.5}
    assert (full.seeds, smoke.seeds) == ((0, 1), (7,))
    assert (smoke.resources.workers, smoke.resources.slots) == (2, 2)
    assert (full.name, smoke.name) == ("tiny", "tiny_smoke")


def test_nested_and_dotted_settings_are_the_same_and_a_mixture_is_one_value():
    nested = {"data": {"samples": 3, "mixture": {"general": 1}}, "optim": {"lr": 0.1}}
    dotted = {"data.samples": 3, "data.mixture": {"general": 1}, "optim.lr": 0.1}
    assert flat(nested, "set") == flat(dotted, "set") == dotted


def test_packaged_studies_are_found_with_dashes_too():
    assert find("twice-the-samples") == find("twice_the_samples")
    with pytest.raises(UserError, match="did you mean 'twice_the_samples'"):
        find("twice_the_sample")
