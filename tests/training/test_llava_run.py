"""A whole run on a checkpoint in LLaVA-1.5's format: trained, answered, recorded, and restored from its folder."""

import json

import pytest
import torch

from tests.llava import checkpoints
from tests.training.runs import do, small
from workloads import adapters, record
from workloads.config import ModelConfig
from workloads.llava.build import build


@pytest.fixture(scope="module", params=["crop", "pad"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoints.write(folder / "llava")
    model = {"name_or_path": str(folder / "llava"), "image_aspect": request.param, "attention": "eager"}
    config = small("mole", model=model, data={"samples": 8}, eval={"samples": 3})
    return folder, config, *do(config, folder / "out")


def test_it_learns_and_its_record_names_the_checkpoint(finished):
    folder, config, result, reports = finished
    losses = [report["loss"] for report in reports if report["event"] == "train"]
    assert len(losses) == 1
    assert result.identity["image_processor"] == "CLIPImageProcessorPil"
    rows = [json.loads(line) for line in (folder / "out" / record.PREDICTIONS).read_text().splitlines()]
    assert len(rows) == 9
    assert not any("<image>" in row["prompt"] for row in rows)
    tree = json.loads((folder / "out" / record.ADAPTER / "adapter_config.json").read_text())
    assert tree["base_model_name_or_path"] == config.model.name_or_path


def test_the_saved_adapter_gives_the_trained_models_outputs(finished):
    folder, config, _, _ = finished
    llava = build(ModelConfig(name_or_path=config.model.name_or_path), "fp32")
    before = llava.model.lm_head(torch.ones(1, 32))
    attached, _ = adapters.load(llava.model, folder / "out" / record.ADAPTER)
    assert attached.num_weights > 0
    moved = [w for name, w in llava.model.named_parameters() if "_B" in name]
    assert any(w.any() for w in moved)
    assert torch.equal(before, llava.model.lm_head(torch.ones(1, 32)))


def test_features_of_its_tower_are_kept_and_change_nothing(finished, tmp_path):
    _, config, result, _ = finished
    tree = {"model": vars(config.model), "data": {"samples": 8}, "eval": {"samples": 3}}
    cached = small("mole", **tree, execution={"feature_cache": True})
    again, _ = do(cached, tmp_path)
    assert again.fingerprint == result.fingerprint
    assert (again.scores, again.train_loss) == (result.scores, result.train_loss)
