"""The packaged recipes and studies at 7B: valid on files laid out as they say, and each takes a step on tiny ones."""

import dataclasses

import pytest

from orchestrator.single import recipe_config
from orchestrator.study import RECIPES, load
from orchestrator.trials import fixed
from tests.data.writers import dump, lay_out, question
from tests.llava import checkpoints, sentences
from tests.training.runs import do
from workloads import record
from workloads.data import sources
from workloads.errors import UserError
from workloads.evaluation.scorers import score_rows

NAMES = sorted(path.stem for path in RECIPES.glob("llava_7b_*.yaml"))
STUDY, MOLE = "llava_7b_twice_the_samples", RECIPES / "llava_7b_mole.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("base") / "llava")


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_7b_recipe_has_its_source_or_is_said_to_have_none(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    head, body = text.split("name: ", 1)
    assert "arXiv:" in head
    assert "Not\n# run at this size" in head
    parts = body.split("adapter:\n")[1].split("execution:\n")[0]
    lines = [line for line in parts.splitlines() if line.strip() and not line.startswith("    ")]
    stated = ("num_", "rank", "alpha", "dropout", "router_", "balance_", "lr:", "projector_lr", "global_batch",
              "warmup", "weight_decay", "dtype", "samples: 0", "max_length")  # fmt: skip
    for line in lines:
        if line.strip().startswith(stated) and "num_instruction" not in line:
            assert "#" in line, line


@pytest.mark.parametrize("name", NAMES)
def test_a_7b_recipe_takes_a_step_and_answers_on_tiny_files(name, base, tmp_path):
    lay_out(tmp_path / "data", RECIPES / f"{name}.yaml")
    small = [
        f"data.root={tmp_path / 'data'}", f"model.name_or_path={base}", "optim.global_batch=2", "eval.samples=2",
        "eval.max_new_tokens=3", "execution.micro_batch=1", "execution.eval_batch=4", "execution.threads=1",
        "execution.gpus_per_worker=0",
    ]  # fmt: skip
    if name.endswith("mole"):
        small.append("data.samples=2")
    if name.endswith("cvit"):
        small.append(f"adapter.encoder={sentences.write_encoder(tmp_path / 'encoder')}")
    config = recipe_config(name, small)
    result, _ = do(config, tmp_path / "run")
    assert result.num_steps >= 1
    assert result.num_rejected == 0
    scored = config.eval.domains or list(config.data.domains)
    assert sorted(result.scores) == sorted(scored)
    assert (tmp_path / "run" / record.ADAPTER / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_7b_recipe_without_its_files_is_one_clear_line(name, base, tmp_path):
    for words, place in (
        ([], "the working folder; data.root is not set"),
        ([f"data.root={tmp_path}"], tmp_path),
    ):
        config = recipe_config(name, [f"model.name_or_path={base}", *words])
        with pytest.raises(UserError) as error:
            sources.check(config)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(f"no such file in {place}")


def test_doc_vqa_is_scored_by_the_nearest_of_all_references(base, tmp_path):
    lay_out(tmp_path, MOLE)
    asked = [question(i, answer=["17 March", f"{i} April", "noon"]) for i in range(3)]
    dump(tmp_path / "doc_vqa" / "test.json", asked)
    data = recipe_config("llava_7b_mole", [f"data.root={tmp_path}", f"model.name_or_path={base}"]).data
    found = sources.of(data)
    given = ("17 march", "1 april", "moon")
    rows = [
        {"raw": raw, "answer": row["answers"]}
        for raw, row in zip(given, found.load("doc_vqa", "test"), strict=True)
    ]
    assert score_rows(found.scorer("doc_vqa"), rows).rows == (1.0, 1.0, 0.75)


@pytest.mark.parametrize("profile", ["full", "smoke"])
def test_the_study_at_7b_is_valid_with_files_and_the_models_config_alone(profile, base, tmp_path):
    lay_out(tmp_path / "data", MOLE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((base / "config.json").read_bytes())
    places = [f"data.root={tmp_path / 'data'}", f"model.name_or_path={tmp_path / 'model'}", "eval.samples=6"]
    study = load(STUDY, profile, places)
    trials = fixed(study)
    assert len(trials) == len({trial.fingerprint for trial in trials}) == 8 * len(study.seeds)
    assert {trial.config.execution.workers for trial in trials} == {8}
    by_arm = {trial.arm: trial.config for trial in trials}
    mole, lora, iso = (by_arm[name].adapter for name in ("mole_hard", "lora_mix", "lora_mix_iso"))
    assert mole.alpha / mole.rank_per_expert == lora.alpha / lora.rank == iso.alpha / iso.rank == 2
    assert mole.dropout == lora.dropout == 0.05
    assert by_arm["lora_mix_2n"].data.mixture["general"] == 2
    for arm in study.comparison["solo"].values():
        assert set(by_arm[arm].eval.domains) == {d for d, a in study.comparison["solo"].items() if a == arm}


@pytest.mark.parametrize("arm", ["solo_document", "lora_mix_2n", "mole_scaled"])
def test_an_arm_of_the_study_takes_a_step_on_tiny_files(arm, base, tmp_path):
    lay_out(tmp_path / "data", MOLE)
    changes = [
        f"data.root={tmp_path / 'data'}", f"model.name_or_path={base}", "data.samples=2", "optim.global_batch=8",
        "eval.samples=2", "eval.max_new_tokens=3", "execution.micro_batch=8", "execution.threads=1",
    ]  # fmt: skip
    study = load(STUDY, "full", changes)
    config = next(trial.config for trial in fixed(study) if trial.arm == arm)
    alone = dataclasses.replace(config.execution, workers=1, gpus_per_worker=0.0)
    result, _ = do(dataclasses.replace(config, execution=alone), tmp_path / "run")
    weights = sum(config.data.mixture.values())
    assert (result.num_samples, result.num_steps) == (2 * weights, -(-2 * weights // 8))
