"""Methods that know tasks by name, over three tasks in order: what is kept, what is restored, what is answered."""

import dataclasses
import importlib

import pytest
import torch

from tests.adapters.minimal import attached, cases, make_config
from tests.adapters.streams import TASKS, batch_of, begin, learn, logits, step
from tests.adapters.test_contract import decode, places
from workloads import adapters

# Their tasks are those of ready files.
READY = ("icm_lora", "meteora", "moa-frozen")


def knows_tasks(case):
    kind = importlib.import_module(f"workloads.adapters.{case.partition('-')[0]}").Config
    return case not in READY and "tasks" in {field.name for field in dataclasses.fields(kind)}


pytestmark = pytest.mark.parametrize("case", [case for case in cases() if knows_tasks(case)])


@pytest.fixture
def config(case, tiny_llava, tmp_path):
    """The method's smallest configuration with the stream's tasks."""
    made = dataclasses.replace(make_config(case, tmp_path / "files", tiny_llava), tasks=list(TASKS))
    made.check()
    return made


def fresh(make_model, config):
    """The method on a fresh base."""
    return attached(make_model, config, tasks=(TASKS[0], TASKS[0]))


def test_a_stage_starts_from_the_folder_of_the_one_before_as_if_there_were_no_folder(
    config, tiny_llava, tmp_path
):
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described)
    staged = None
    for number, task in enumerate(TASKS):
        staged, staged_trace, staged_described = fresh(tiny_llava, config)
        if number:
            weights = adapters.read(tmp_path / str(number - 1))
            names = adapters.saved_names(staged, staged_described)
            adapters.put(staged, weights, names, "here")
        learn(staged, staged_trace, staged_described, [task])
        saved = adapters.weights_of(staged, staged_described)
        adapters.save(tmp_path / str(number), saved, config, staged_described, "tiny")
    whole = adapters.weights_of(model, described)
    assert set(whole) == set(saved)
    for name, weight in whole.items():
        assert torch.equal(saved[name], weight), name
    for task in TASKS:
        assert torch.equal(logits(staged, staged_trace, task), logits(model, trace, task))


def test_a_stage_cut_short_goes_on_from_its_checkpoint_with_equal_weights(config, tiny_llava):
    """Start weights, then the task's start, then the checkpoint, as a run does it."""
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described, TASKS[:2])
    start = {name: w.clone() for name, w in adapters.weights_of(model, described).items()}
    described.on_task_start(TASKS[2])
    model.train()
    step(model, trace, described, TASKS[2])
    cut = {name: w.clone() for name, w in adapters.weights_of(model, described).items()}
    step(model, trace, described, TASKS[2])
    described.on_task_end(TASKS[2])

    other, other_trace, other_described = fresh(tiny_llava, config)
    adapters.put(other, start, adapters.saved_names(other, other_described), "start")
    other_described.on_task_start(TASKS[2])
    adapters.put(other, cut, adapters.saved_names(other, other_described), "checkpoint")
    other.train()
    step(other, other_trace, other_described, TASKS[2])
    other_described.on_task_end(TASKS[2])
    again = adapters.weights_of(other, other_described)
    for name, weight in adapters.weights_of(model, described).items():
        assert torch.equal(again[name], weight), name


def test_a_start_told_twice_changes_nothing(config, tiny_llava):
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described, TASKS[:2])
    described.on_task_start(TASKS[2])
    model.train()
    step(model, trace, described, TASKS[2])
    before = {name: w.clone() for name, w in adapters.weights_of(model, described).items()}
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    described.on_task_start(TASKS[2])
    assert {name for name, w in model.named_parameters() if w.requires_grad} == trained
    assert all(torch.equal(w, before[name]) for name, w in adapters.weights_of(model, described).items())


def test_after_three_tasks_padding_changes_no_answer(config, tiny_llava):
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described)
    task = TASKS[1]
    batch = batch_of(task)
    for shift in (0, 3):
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
        ids[1], mask[1] = ids[1].roll(shift), mask[1].roll(shift)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
        begin(trace, task)
        with torch.no_grad():
            padded = model(**inputs, pixel_values=batch["pixel_values"]).logits[1, shift : shift + 9]
            trace.begin(trace.questions[1:], trace.tasks[1:])
            alone = {name: value[1:, shift : shift + 9] for name, value in inputs.items()}
            alone = model(**alone, pixel_values=batch["pixel_values"][1:]).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-11)


def test_after_three_tasks_decoding_equals_the_full_forward(config, tiny_llava):
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described)
    model.trace_of_test = trace
    batch = batch_of(TASKS[2])
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    begin(trace, TASKS[2])
    trace.questions, trace.tasks = trace.questions[:1], trace.tasks[:1]
    with torch.no_grad():
        cached, _ = decode(model, ids, torch.ones_like(ids), pixels, 7)
        trace.prompt_lengths = (7,)
        full = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(cached, full, rtol=1e-9, atol=1e-11)


def test_recomputation_under_checkpointing_changes_nothing_of_a_stream(config, tiny_llava):
    results = []
    for checkpointing in (False, True):
        model, trace, described = fresh(tiny_llava, config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        learn(model, trace, described)
        results.append(adapters.weights_of(model, described))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-9, atol=1e-12, msg=name)


def test_generation_selects_the_tasks_that_the_full_forward_selects_and_answers_alike(config, tiny_llava):
    """transformers encodes a prompt's images before it enters the model."""
    model, trace, described = fresh(tiny_llava, config)
    learn(model, trace, described, lr=0.2)
    for task in TASKS:
        batch = batch_of(task)
        full = logits(model, trace, task)
        chosen = described.selected() if described.selected else None
        for key in ("input_ids", "attention_mask"):
            batch[key][1] = batch[key][1].roll(3)
        begin(trace, task)
        made = model.generate(
            **batch, do_sample=False, max_new_tokens=2, pad_token_id=0, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        trace.clear()
        assert chosen is None or described.selected() == chosen
        expected = torch.stack([full[0, 11], full[1, 8]])
        # generate hands out logits in fp32.
        torch.testing.assert_close(made.logits[0], expected.float(), rtol=0, atol=1e-6)


def test_who_selects_tasks_tells_three_that_look_and_ask_differently_apart(config, tiny_llava):
    model, trace, described = fresh(tiny_llava, config)
    if described.selected is None:
        pytest.skip("selects no tasks")
    learn(model, trace, described, num_steps=30)
    found = []
    for task in TASKS:
        logits(model, trace, task)
        found.append(described.selected())
    assert found == [[task, task] for task in TASKS]
