"""What every adapter method keeps, whatever it does: run over all files of workloads/adapters."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from workloads import adapters
from workloads.adapters.base import Trace
from workloads.config import methods
from workloads.training.checkpoint import load_weights, trained_weights

SMALL = {"lora": {"rank": 2}, "mole": {"rank_per_expert": 2, "router_grad": "scaled"}}


def config_of(name):
    return importlib.import_module(f"workloads.adapters.{name}").Config(**SMALL.get(name, {}))


def attached(tiny_llava, name, seed=0):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    described = adapters.attach(model, config_of(name), trace)
    trace.watch(model)
    return model, trace, described


def randomise(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.2)


@pytest.mark.parametrize("name", methods())
def test_training_starts_at_the_base_model(name, tiny_llava, batch):
    model, _, _ = attached(tiny_llava, name)
    torch.testing.assert_close(model(**batch).logits, tiny_llava()(**batch).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", methods())
def test_base_weights_stay_frozen(name, tiny_llava):
    base = {key for key, _ in tiny_llava().named_parameters()}
    model, _, _ = attached(tiny_llava, name)
    for key, weight in model.named_parameters():
        if key.replace(".base_layer", "") in base:
            assert not weight.requires_grad, key


@pytest.mark.parametrize("name", methods())
def test_same_seed_gives_the_same_initial_weights(name, tiny_llava):
    first, again, other = (trained_weights(attached(tiny_llava, name, seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", methods())
def test_saved_and_loaded_adapter_gives_equal_logits(name, tiny_llava, batch, tmp_path):
    model, _, described = attached(tiny_llava, name)
    model.model.multi_modal_projector.requires_grad_(True)
    randomise(model)
    adapters.save(tmp_path, trained_weights(model), config_of(name), described, "tiny")
    other, _, _ = attached(tiny_llava, name, seed=9)
    other.model.multi_modal_projector.requires_grad_(True)
    load_weights(other, adapters.read(tmp_path), str(tmp_path))
    assert torch.equal(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("name", methods())
def test_padding_changes_no_answer(name, tiny_llava, batch):
    model, _, _ = attached(tiny_llava, name)
    randomise(model)
    padded = model(**batch).logits[1, :9]
    alone = model(
        input_ids=batch["input_ids"][1:, :9],
        attention_mask=batch["attention_mask"][1:, :9],
        pixel_values=batch["pixel_values"][1:],
    ).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", methods())
def test_decoding_with_a_cache_equals_the_full_forward(name, tiny_llava, batch):
    model, trace, _ = attached(tiny_llava, name)
    randomise(model)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    full = model(input_ids=ids, pixel_values=pixels).logits
    assert trace.phase == "full"
    cache = DynamicCache()
    steps = [model(input_ids=ids[:, :7], pixel_values=pixels, past_key_values=cache, use_cache=True).logits]
    assert trace.phase == "prefill"
    for t in range(7, ids.shape[1]):
        steps.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        assert (trace.phase, trace.past_length) == ("decode", t)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", methods())
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name, tiny_llava, batch):
    results = []
    for checkpointing in (False, True):
        model, trace, described = attached(tiny_llava, name)
        randomise(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        for term in described.losses(trace).values():
            loss = loss + term
        loss.backward()
        trace.clear()
        results.append((loss.detach(), {k: w.grad for k, w in model.named_parameters() if w.requires_grad}))
    (plain, plain_grads), (recomputed, recomputed_grads) = results
    torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=0)
    for key, gradient in plain_grads.items():
        assert gradient is not None, key
        torch.testing.assert_close(gradient, recomputed_grads[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", methods())
def test_stated_weights_are_those_that_train(name, tiny_llava):
    model, _, described = attached(tiny_llava, name)
    assert described.num_weights == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert 0 < described.num_active <= described.num_weights


@pytest.mark.parametrize("name", methods())
def test_a_missing_weight_is_named(name, tiny_llava):
    from workloads.errors import UserError

    model, _, _ = attached(tiny_llava, name)
    weights = trained_weights(model)
    lost = sorted(weights)[0]
    del weights[lost]
    with pytest.raises(UserError, match="lacks " + lost.replace(".", r"\.")):
        load_weights(model, weights, "here")


# Another value for every setting that a method may say steers training alone.
OTHERWISE = {
    "dropout": 0.5,
    "balance_weight": 3.0,
    "balance_form": "switch",
    "balance_scope": "per_layer",
    "router_grad": "straight_through",
}


@pytest.mark.parametrize("name", methods())
def test_settings_of_training_alone_change_no_output(name, tiny_llava, batch):
    plain = importlib.import_module(f"workloads.adapters.{name}").Config()
    changed = replace(plain, **{key: OTHERWISE[key] for key in plain.training_only()})
    assert changed != plain
    outputs = []
    for config in (plain, changed, replace(plain, alpha=plain.alpha * 2)):
        model, trace = tiny_llava(), Trace()
        adapters.attach(model, config, trace)
        trace.watch(model)
        randomise(model)
        outputs.append(model.eval()(**batch).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
