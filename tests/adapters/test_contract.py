"""What every adapter method keeps, whatever it does: run over all files of workloads/adapters that are methods."""

import importlib
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import DynamicCache

from tests.adapters.minimal import NOT_AT_BASE, QUESTIONS, TASKS, attached, cases, draw, drawn, loss_of
from workloads import adapters
from workloads.errors import UserError

pytestmark = pytest.mark.parametrize("case", cases())
# How often gradients are looked for, each time with other weights, before a tensor counts as deaf.
DRAWS = 30
UNKNOWN = ("nowhere", "nobody")


def test_training_starts_at_the_base_model(case, config, tiny_llava, batch):
    ours, base = attached(tiny_llava, config)[0](**batch).logits, tiny_llava()(**batch).logits
    if case in NOT_AT_BASE:
        assert (ours - base).abs().max() > 1e-6, "it does start at the base: take it out of NOT_AT_BASE"
    else:
        torch.testing.assert_close(ours, base, rtol=0, atol=1e-12)


def test_base_weights_keep_their_values_and_stay_frozen(config, tiny_llava, batch):
    base = dict(tiny_llava().named_parameters())
    model, trace, described = drawn(tiny_llava, config)
    model.train()
    loss_of(model, trace, described, batch)
    found = {name.replace(".base_layer", ""): w for name, w in model.named_parameters()}
    for name, weight in base.items():
        assert torch.equal(found[name], weight), name
        assert not found[name].requires_grad, name


def test_same_seed_gives_the_same_initial_weights(config, tiny_llava):
    first, again, other = (
        adapters.weights_of(*(attached(tiny_llava, config, seed)[i] for i in (0, 2))) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    if attached(tiny_llava, config)[2].num_weights:
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_stated_weights_are_those_that_train(config, tiny_llava):
    model, _, described = attached(tiny_llava, config)
    assert described.num_weights == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert 0 <= described.num_active <= described.num_weights
    assert (described.num_active > 0) == (described.num_weights > 0)


def test_all_that_the_method_adds_is_saved_and_nothing_of_the_base(config, tiny_llava):
    model, _, described = attached(tiny_llava, config)
    base = set(tiny_llava().state_dict())
    added = {name for name in model.state_dict() if name.replace(".base_layer", "") not in base}
    assert adapters.saved_names(model, described) == added


def test_saved_and_loaded_it_gives_equal_logits(config, tiny_llava, batch, tmp_path):
    model, _, described = drawn(tiny_llava, config)
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    draw(model, {name for name, w in model.named_parameters() if w.requires_grad}, seed=5)
    adapters.save(tmp_path / "saved", adapters.weights_of(model, described), config, described, "tiny")
    other = tiny_llava()
    _, trace = adapters.load(other, tmp_path / "saved")
    trace.begin(QUESTIONS, TASKS)
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_missing_and_an_unknown_weight_are_named(config, tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, config)
    weights = adapters.weights_of(model, described)
    lost = sorted(weights)[0]
    rest = {name: weight for name, weight in weights.items() if name != lost}
    for given, expected in (
        (rest, f"lacks {lost}"),
        ({**weights, "model.odd": torch.zeros(1)}, "has unknown model.odd"),
    ):
        adapters.save(tmp_path / "saved", given, config, described, "tiny")
        with pytest.raises(UserError, match=expected.replace(".", r"\.")):
            adapters.load(tiny_llava(), tmp_path / "saved")


def test_an_adapter_of_another_version_is_refused(config, tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, config)
    adapters.save(tmp_path / "saved", adapters.weights_of(model, described), config, described, "tiny")
    tree = adapters.settings(tmp_path / "saved")
    weights = adapters.read(tmp_path / "saved")
    adapters.write(tmp_path / "saved", weights, {**tree, "method_version": tree["method_version"] + 1})
    with pytest.raises(UserError, match=f"version {tree['method_version'] + 1}; this is"):
        adapters.load(tiny_llava(), tmp_path / "saved")


def places(mask):
    """Positions of the tokens, counted from the first valid one."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("shift", [0, 3], ids=["right", "left"])
def test_padding_changes_no_answer(config, tiny_llava, batch, shift):
    model, trace, _ = drawn(tiny_llava, config)
    ids, mask, pixels = (batch[key].clone() for key in ("input_ids", "attention_mask", "pixel_values"))
    ids[1], mask[1] = ids[1].roll(shift), mask[1].roll(shift)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
    padded = model(**inputs, pixel_values=pixels).logits[1, shift : shift + 9]
    trace.begin(QUESTIONS[1:], TASKS[1:])
    alone = {name: value[1:, shift : shift + 9] for name, value in inputs.items()}
    torch.testing.assert_close(
        padded, model(**alone, pixel_values=pixels[1:]).logits[0], rtol=1e-9, atol=1e-11
    )


def decode(model, ids, mask, pixels, length):
    """Logits of a prefill of `length` tokens and of the rest token by token, and the routes of every step."""
    cache, steps, routes = DynamicCache(), [], []
    trace = model.trace_of_test
    for start, end in [(0, length), *((t, t + 1) for t in range(length, ids.shape[1]))]:
        shown = {"pixel_values": pixels} if start == 0 else {}
        steps.append(
            model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end],
                position_ids=places(mask)[:, start:end], past_key_values=cache, use_cache=True, **shown,
            ).logits
        )  # fmt: skip
        assert trace.phase == ("decode" if start else "prefill")
        assert trace.past_length == start
        routes.append([route.choice_BT for route in trace.routes])
        trace.clear()
    return torch.cat(steps, dim=1), routes


def test_decoding_with_a_cache_equals_the_full_forward(config, tiny_llava, batch):
    """What is decided once per sample is decided on its prompt; the full forward is told where that ends."""
    model, trace, described = drawn(tiny_llava, config)
    trace.begin(QUESTIONS[:1], TASKS[:1])
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    model.trace_of_test = trace
    cached, routes = decode(model, ids, torch.ones_like(ids), pixels, 7)
    if described.capabilities.routing in ("sample", "sequence"):
        for step in routes:
            for first, now in zip(routes[0], step, strict=True):
                assert torch.equal(now, first[:, :1].expand_as(now))
    trace.prompt_lengths = (7,)
    full = model(input_ids=ids, pixel_values=pixels).logits
    assert trace.phase == "full"
    torch.testing.assert_close(cached, full, rtol=1e-9, atol=1e-11)


def test_decoding_in_a_padded_batch_equals_decoding_alone(config, tiny_llava, batch):
    model, trace, _ = drawn(tiny_llava, config)
    model.trace_of_test = trace
    ids, mask, pixels = (batch[key].clone() for key in ("input_ids", "attention_mask", "pixel_values"))
    ids[1], mask[1] = ids[1].roll(3), mask[1].roll(3)
    together, _ = decode(model, ids, mask, pixels, 10)
    for row, start in ((0, 0), (1, 3)):
        trace.begin(QUESTIONS[row : row + 1], TASKS[row : row + 1])
        mine = slice(row, row + 1)
        alone, _ = decode(model, ids[mine, start:], mask[mine, start:], pixels[mine], 10 - start)
        torch.testing.assert_close(together[mine, start:], alone, rtol=1e-9, atol=1e-11)


def test_routes_have_a_probability_for_every_expert_of_every_token(config, tiny_llava, batch):
    model, trace, described = drawn(tiny_llava, config)
    model(**batch)
    routing = described.capabilities.routing
    assert bool(trace.routes) == (routing != "none")
    layers = [route.layer for route in trace.routes]
    assert layers == sorted(set(layers)), "one route a decoder block, in order"
    for route in trace.routes:
        assert route.probs_BTE.shape[:2] == route.choice_BT.shape == batch["input_ids"].shape
        valid = batch["attention_mask"].bool()
        assert (route.choice_BT[valid] < route.probs_BTE.shape[-1]).all()
        if routing in ("sample", "sequence", "task"):
            assert torch.equal(route.choice_BT, route.choice_BT[:, :1].expand_as(route.choice_BT))


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(config, tiny_llava, batch):
    results = []
    for checkpointing in (False, True):
        model, trace, described = drawn(tiny_llava, config)
        model.model.multi_modal_projector.requires_grad_(True)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = loss_of(model, trace, described, batch)
        loss.backward()
        trace.clear()
        results.append((loss.detach(), {k: w.grad for k, w in model.named_parameters() if w.requires_grad}))
    (plain, plain_grads), (recomputed, recomputed_grads) = results
    torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=0)
    for key, gradient in plain_grads.items():
        assert gradient is not None, key
        torch.testing.assert_close(gradient, recomputed_grads[key], rtol=1e-9, atol=1e-12)


def test_every_trained_tensor_learns_or_is_listed_as_silent(config, tiny_llava, batch):
    """In one of some draws, that is: what no sample visits learns nothing then. Gradients are always there, though."""
    model, trace, described = attached(tiny_llava, config)
    model.train()
    silent = tuple(getattr(importlib.import_module(f"workloads.adapters.{config.name}"), "SILENT", ()))
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    deaf = set(trained)
    for seed in range(DRAWS):
        draw(model, adapters.saved_names(model, described), seed)
        model.zero_grad()
        if not trained:
            break
        loss_of(model, trace, described, batch).backward()
        trace.clear()
        for name, weight in trained.items():
            assert weight.grad is not None, f"{name} is not in the graph"
        deaf -= {name for name in deaf if float(trained[name].grad.abs().max()) > 0}
        if not deaf:
            break
    assert {name for name in deaf if not name.endswith(silent or ("\0",))} == set()


def test_who_needs_no_task_id_gives_the_same_whatever_it_is(config, tiny_llava, batch):
    model, trace, described = drawn(tiny_llava, config)

    def infer():
        with torch.no_grad():
            return model.eval()(**batch).logits

    def train():
        torch.manual_seed(0)
        return loss_of(model.train(), trace, described, batch)

    can = described.capabilities
    for declared, act in ((can.needs_task_id_infer, infer), (can.needs_task_id_train, train)):
        trace.begin(QUESTIONS, TASKS)
        told = act()
        trace.clear()
        trace.begin(QUESTIONS, UNKNOWN)
        if declared:
            with pytest.raises(UserError, match="nowhere"):
                act()
        else:
            assert torch.equal(told, act())
        trace.clear()


def test_who_needs_a_task_id_says_so_before_there_is_a_model(config, tiny_llava):
    """A study is refused by what the configuration says, not by what the attached method meets."""
    _, _, described = attached(tiny_llava, config)
    can = described.capabilities
    said = "always" if can.needs_task_id_infer else "in training" if can.needs_task_id_train else "never"
    assert config.told_tasks() == said


# Another value for every setting that a method may say steers training alone; one of a choice is told apart below.
OTHERWISE = {
    "align_weight": 3.0,
    "balance_form": "switch",
    "balance_scope": "per_layer",
    "balance_weight": 3.0,
    "contrast_temperature": 0.7,
    "contrast_weight": 3.0,
    "domain_weight": 3.0,
    "drop_projectors": True,
    "dropout": 0.5,
    "folders": {},
    "freeze_A_after_task": True,
    "freeze_branches": False,
    "gate_weight": 3.0,
    "marked_weight": 3.0,
    "min_tunable": 1,
    "orthogonality_weight": 3.0,
    "prototype_weight": 3.0,
    "train_loras": False,
    "train_with_past": False,
}


def modes(config):
    """The configuration with every router gradient that the method has."""
    known = get_args(get_type_hints(type(config)).get("router_grad"))
    return [replace(config, router_grad=mode) for mode in known] or [config]


def given(make_model, config, weights, batch):
    """What the method computes with given weights."""
    model, _, described = attached(make_model, config)
    adapters.put(model, weights, adapters.saved_names(model, described), "here")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_settings_of_training_alone_change_no_output(config, tiny_llava, batch):
    """Nor what is saved. The forms of a router's gradient that are free are those that take each other's weights."""
    forms = modes(config)
    for plain in forms:
        model, _, described = drawn(tiny_llava, plain)
        weights = adapters.weights_of(model, described)
        output = given(tiny_llava, plain, weights, batch)
        free = plain.training_only()
        others = [replace(plain, **{key: OTHERWISE[key] for key in free - {"router_grad"}})]
        if "router_grad" in free:
            same = [form for form in forms if form != plain and "router_grad" in form.training_only()]
            assert same
            others += same
        for other in others:
            found = given(tiny_llava, other, weights, batch)
            torch.testing.assert_close(found, output, rtol=1e-12, atol=1e-12)
        if hasattr(plain, "alpha"):
            doubled = given(tiny_llava, replace(plain, alpha=plain.alpha * 2), weights, batch)
            assert not torch.allclose(output, doubled)


def test_a_batch_that_does_not_count_leaves_the_state_and_takes_part_in_every_sum(config, tiny_llava, batch):
    model, trace, described = drawn(tiny_llava, config)
    described.on_task_start(TASKS[0])
    model.train()
    calls = {}
    for counted in (False, True):
        before = {name: w.clone() for name, w in adapters.weights_of(model, described).items()}
        trace.begin(QUESTIONS, TASKS, counted=counted)
        loss_of(model, trace, described, batch)
        trace.clear()
        parts = calls[counted] = []
        described.after_step(lambda part, parts=parts: (parts.append(part.shape), part)[1])
        after = adapters.weights_of(model, described)
        if not counted:
            assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert calls[False] == calls[True]
    assert bool(calls[True]) == any(not torch.equal(after[name], weight) for name, weight in before.items())


def test_what_is_put_in_takes_over_whether_the_model_is_in_training(config, tiny_llava):
    for training in (True, False):
        model, _, _ = attached(lambda training=training: tiny_llava().train(training), config)
        found = {name for name, module in model.named_modules() if module.training != training}
        # The frozen sentence encoder is never in training.
        assert not {name for name in found if "encoder.model" not in name}
