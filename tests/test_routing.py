"""Gates and balance losses against loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads import routing


def draw(L, B, T, E, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(L, B, T, E, generator=generator, dtype=torch.float64).softmax(-1)
    mask = torch.rand(B, T, generator=generator) > 0.3
    return probs.requires_grad_(), probs.argmax(-1), mask


def slow_pair(probs, choice, cells):
    """Mean probability and share of each expert over (layer, sample, token) cells."""
    E = probs.shape[-1]
    P = [
        sum((probs[c][j] for c in cells), torch.zeros((), dtype=torch.float64)) / max(1, len(cells))
        for j in range(E)
    ]
    C = [sum(int(choice[c]) == j for c in cells) / max(1, len(cells)) for j in range(E)]
    return sum(p * c for p, c in zip(P, C, strict=True))


def slow_balance(probs, choice, mask, form, scope):
    L, B, T, E = probs.shape
    groups = [[layer] for layer in range(L)] if scope == "per_layer" else [list(range(L))]
    values = []
    for layers in groups:
        if form == "sample":
            per_sample = [
                slow_pair(probs, choice, [(layer, b, t) for layer in layers for t in range(T) if mask[b, t]])
                for b in range(B)
            ]
            values.append(sum(per_sample) / B)
        else:
            cells = [(layer, b, t) for layer in layers for b in range(B) for t in range(T) if mask[b, t]]
            values.append(E * slow_pair(probs, choice, cells))
    return sum(values) / len(values)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["sample", "switch"]), st.sampled_from(["joint", "per_layer"]), st.integers(1, 3),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000),
)  # fmt: skip
def test_balance_loss_equals_a_loop_with_its_gradient(form, scope, L, B, T, E, seed):
    probs, choice, mask = draw(L, B, T, E, seed)
    ours = routing.balance_loss(probs, choice, mask, form, scope)
    theirs = slow_balance(probs, choice, mask, form, scope)
    torch.testing.assert_close(ours, theirs + 0 * probs.sum(), rtol=1e-12, atol=1e-12)
    (a,) = torch.autograd.grad(ours, probs)
    (b,) = torch.autograd.grad(theirs + 0 * probs.sum(), probs)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["joint", "per_layer"])
def test_sample_form_does_not_depend_on_how_samples_are_batched(scope):
    probs, choice, mask = draw(2, 6, 5, 3, seed=4)
    whole = routing.balance_loss(probs, choice, mask, "sample", scope)
    halves = [
        routing.balance_loss(probs[:, s], choice[:, s], mask[s], "sample", scope)
        for s in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole, (2 * halves[0] + 4 * halves[1]) / 6, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["sample", "switch"])
def test_padding_does_not_enter_the_balance_loss(form):
    probs, choice, mask = draw(2, 3, 4, 3, seed=9)
    mask[:, 2:] = False
    short = routing.balance_loss(probs[:, :, :2], choice[:, :, :2], mask[:, :2], form, "joint")
    padded = routing.balance_loss(probs, choice, mask, form, "joint")
    torch.testing.assert_close(short, padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_uniform_routing_gives_the_published_balanced_value(num_experts):
    tokens = num_experts * 4
    probs = torch.full((1, 1, tokens, num_experts), 1 / num_experts, dtype=torch.float64)
    choice = (torch.arange(tokens) % num_experts).reshape(1, 1, tokens)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    assert float(routing.balance_loss(probs, choice, mask, "sample", "joint")) == pytest.approx(
        1 / num_experts
    )
    assert float(routing.balance_loss(probs, choice, mask, "switch", "joint")) == pytest.approx(1.0)


def test_load_counts_valid_tokens_once():
    probs, choice, mask = draw(2, 3, 5, 4, seed=2)
    counts = routing.load(choice, mask, 4)
    for layer in range(2):
        for b in range(3):
            for e in range(4):
                slow = sum(int(choice[layer, b, t]) == e and bool(mask[b, t]) for t in range(5))
                assert int(counts[layer, b, e]) == slow


def test_top1_probabilities_are_fp32_and_sum_to_one():
    probs, choice = routing.top1(torch.randn(2, 3, 4).bfloat16())
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))
    assert torch.equal(choice, probs.argmax(-1))
