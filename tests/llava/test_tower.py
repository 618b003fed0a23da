"""The remembered tower: features are what the live tower says, and a run with them is the same run."""

import shutil

import pytest
import torch

from tests.training.runs import do, small
from workloads import record
from workloads.config import DataConfig, ModelConfig
from workloads.data import pool
from workloads.data.cache import ENVIRONMENT_KEY, cache_dir
from workloads.data.collate import vision
from workloads.errors import UserError
from workloads.llava import tower
from workloads.llava.build import build

LEVELS = [-1, -2, -4]
SPLIT = "val"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache with the pictures and no features."""
    here = tmp_path / "cache"
    here.mkdir()
    llava = build(ModelConfig(), "fp32")
    pool.load(DataConfig(), "document", SPLIT, llava.prompter)  # composed and vetted, if they were not
    for part in ("pocket", "verdicts"):
        (here / part).symlink_to(cache_dir() / part)
    monkeypatch.setenv(ENVIRONMENT_KEY, str(here))
    return here


def filled(blind=False, indices=(3, 40, 7), change=lambda llava: None):
    llava = build(ModelConfig(), "fp32")
    change(llava)
    plain = pool.load(DataConfig(blind=blind), "document", SPLIT, llava.prompter)
    (opened,) = tower.with_features(llava, [plain], LEVELS)
    tower.fill(llava, opened, indices, LEVELS)
    return llava, plain, opened


@pytest.mark.parametrize("blind", [False, True])
def test_features_are_bit_equal_to_the_live_tower_on_every_level(blind, own_cache):
    llava, plain, opened = filled(blind)
    for index in (3, 7, 40):
        with torch.no_grad():
            seen = tower.tower_of(llava)(vision([plain.sample(index)], llava), output_hidden_states=True)
        kept_LPD = opened.sample(index).features_LPD
        assert all(torch.equal(kept_LPD[i], seen.hidden_states[level][0]) for i, level in enumerate(LEVELS))


def test_the_stand_in_gives_projector_and_cues_what_the_tower_gives_them(own_cache):
    llava, plain, opened = filled()
    live = vision([plain.sample(i) for i in (3, 7)], llava)
    with torch.no_grad():
        wanted = llava.model.get_image_features(live, vision_feature_layer=-1).pooler_output
        tower.stand_in(llava, LEVELS)
        kept = vision([opened.sample(i) for i in (3, 7)], llava)
        found = llava.model.get_image_features(kept, vision_feature_layer=-1).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("vce", [False, True])
def test_a_run_with_features_is_the_run_without_to_the_bit(vce, own_cache, tmp_path):
    model = {"vce": vce, "vce_heads": 4}
    live, seen = do(small("mole", model=model), tmp_path / "live")
    config = small("mole", model=model, execution={"feature_cache": True})
    for name in ("filling", "reading"):
        kept, reports = do(config, tmp_path / name)
        assert (kept.scores, kept.train_loss, kept.routing) == (live.scores, live.train_loss, live.routing)
        assert [r["loss"] for r in reports if "loss" in r] == [r["loss"] for r in seen if "loss" in r]
        assert kept.fingerprint == live.fingerprint
        assert (tmp_path / name / record.PREDICTIONS).read_bytes() == (
            tmp_path / "live" / record.PREDICTIONS
        ).read_bytes()
    assert (own_cache / "features").is_dir()


def test_only_missing_rows_are_computed(own_cache, monkeypatch):
    asked = []
    real = tower.vision
    monkeypatch.setattr(
        tower,
        "vision",
        lambda samples, llava: asked.append([s.id for s in samples]) or real(samples, llava),
    )
    filled(indices=(3, 7))
    asked.clear()
    _, plain, _ = filled(indices=(3, 7, 40))
    # The first is looked at for its shape alone.
    assert asked == [[plain.sample(plain.accepted[0]).id], [plain.sample(40).id]]


def brighter(llava):
    llava.processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def other_weights(llava):
    with torch.no_grad():
        next(tower.tower_of(llava).parameters()).add_(0.01)


@pytest.mark.parametrize("change", [brighter, other_weights, lambda llava: llava.model.bfloat16()])
def test_another_image_processing_tower_or_dtype_has_features_of_its_own(change, own_cache):
    filled()
    _, _, opened = filled(indices=(), change=change)
    assert opened.features.missing([3, 40, 7]) == [3, 40, 7]


def test_a_cache_that_cannot_be_written_is_told_in_one_line(own_cache, tmp_path):
    (own_cache / "features").write_text("")
    with pytest.raises(UserError) as error:
        do(small(execution={"feature_cache": True}), tmp_path / "run")
    assert str(error.value).startswith(f"{ENVIRONMENT_KEY}: cannot write in {own_cache / 'features'}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_deleted_features_are_made_again(own_cache):
    _, _, opened = filled()
    before = opened.features.read(7).clone()
    shutil.rmtree(own_cache / "features")
    assert torch.equal(filled()[2].features.read(7), before)
