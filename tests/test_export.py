"""A finished run's adapter for other software: each form answers as the run's own model does."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from tests.training.runs import do, small
from workloads import adapters, record
from workloads.config import ModelConfig
from workloads.errors import UserError
from workloads.export import export
from workloads.llava.build import build


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    do(small("lora", optim={"lr": 0.01}), folder)
    return folder


def logits(model):
    tokenizer_ids = torch.tensor([[1] + [3] * 64 + [40, 50, 60]])
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=tokenizer_ids, pixel_values=image).logits


@pytest.fixture(scope="module")
def expected(run):
    llava = build(ModelConfig(), "fp32")
    before = logits(llava.model)
    adapters.load(llava.model, run / record.ADAPTER)
    after = logits(llava.model)
    assert (after - before).abs().max() > 1e-2
    return after


def test_the_adapter_form_is_the_run_s_own_folder(run, expected, tmp_path):
    export(run, tmp_path / "out", "adapter")
    llava = build(ModelConfig(), "fp32")
    adapters.load(llava.model, tmp_path / "out")
    torch.testing.assert_close(logits(llava.model), expected, atol=0, rtol=0)


def test_peft_loads_the_peft_form_with_equal_logits(run, expected, tmp_path):
    export(run, tmp_path / "out", "peft")
    model = PeftModel.from_pretrained(build(ModelConfig(), "fp32").model, str(tmp_path / "out"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_merged_form_is_a_whole_checkpoint_with_equal_logits(run, expected, tmp_path):
    export(run, tmp_path / "out", "merged")
    merged = build(ModelConfig(name_or_path=str(tmp_path / "out")), "fp32")
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-5, rtol=1e-5)
    assert (
        merged.prompter.tokenizer.get_vocab() == build(ModelConfig(), "fp32").prompter.tokenizer.get_vocab()
    )


def test_every_task_of_a_task_method_has_a_lora_of_its_own(tmp_path):
    tasks = ["general", "document", "biomedical"]
    do(small("mtl_lora", adapter_fields={"tasks": tasks}, optim={"lr": 0.01}), tmp_path / "run")
    llava = build(ModelConfig(), "fp32")
    _, trace = adapters.load(llava.model, tmp_path / "run" / record.ADAPTER)
    found = []
    for task in tasks:
        trace.begin(["what is this ?"], [task])
        found.append(logits(llava.model))
        for form in ("peft", "merged"):
            export(tmp_path / "run", tmp_path / f"{form}-{task}", form, task)
        peft = PeftModel.from_pretrained(build(ModelConfig(), "fp32").model, str(tmp_path / f"peft-{task}"))
        merged = build(ModelConfig(name_or_path=str(tmp_path / f"merged-{task}")), "fp32").model
        for other in (peft, merged):
            torch.testing.assert_close(logits(other), found[-1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(found[0], found[1])
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="general, document, biomedical"):
            export(tmp_path / "run", tmp_path / "out", form, "generel")
        assert not (tmp_path / "out").exists()


def test_a_run_with_visual_cues_has_its_own_form_alone(tmp_path):
    model = {"vce": True, "vce_heads": 4}
    do(small("lora", model=model, optim={"lr": 0.01}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "own", "adapter")
    llavas = [build(ModelConfig(), "fp32") for _ in range(2)]
    for llava, folder in zip(llavas, (tmp_path / "run" / record.ADAPTER, tmp_path / "own"), strict=True):
        adapters.load(llava.model, folder)
    first, second = (logits(llava.model) for llava in llavas)
    assert torch.equal(first, second)
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="VCE"):
            export(tmp_path / "run", tmp_path / "out", form)
        assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        export(run, tmp_path, "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_base_than_in_training_is_refused(run, tmp_path):
    saved = record.load(run)
    other = tmp_path / "other"
    other.mkdir()
    record.save(replace(saved, identity={**saved.identity, "model": "0" * 16}), other)
    with pytest.raises(UserError, match="not the base"):
        export(other, tmp_path / "out", "adapter")


def test_a_method_that_is_no_plain_lora_says_why_and_writes_nothing(tmp_path):
    do(small("mole"), tmp_path / "run")
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="cannot be"):
            export(tmp_path / "run", tmp_path / "out", form)
        assert not (tmp_path / "out").exists()
