"""CL-MoE against loops over tokens and experts in float64: gates, visits, what an end keeps, what a start folds."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.streams import TASKS, batch_of, learn, logits, step
from tests.llava.sentences import write_encoder
from workloads import adapters
from workloads.adapters import cl_moe, lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError

ALPHA = 3.0


def make_linear(num_tasks=3, experts=3, rank=2, seed=0, dtype=torch.float64, **fields):
    """One linear with random weights, past ones as well; `nearest_B` of its means is set by the test."""
    torch.manual_seed(seed)
    names = [f"t{k}" for k in range(num_tasks)]
    fields = {"top_k": min(2, experts), **fields}
    config = cl_moe.Config(tasks=names, num_experts=experts, rank_total=experts * rank, alpha=ALPHA, **fields)
    means = SimpleNamespace(trace=Trace(), task=None)
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    linear = cl_moe.MomentumExperts(base, config, means, Spot(path="q_proj", layer=0, leads=True))
    with torch.no_grad():
        for weight in (linear.router, linear.experts_A, linear.experts_B, linear.past_A, linear.past_B):
            weight.normal_(std=0.6)
    return linear, means


def slow_probs(router, x):
    powers = [(row * x).sum().exp() for row in router]
    return [p / sum(powers) for p in powers]


def slow_linear(linear, x_BTI, shares_B, kept_E, beta):
    """W x + s sum_e gate_e B_e A_e x with A_e and B_e mixed; `shares_B` is None where a sample has no task."""
    total = linear.config.rank_total
    rows = []
    for sample, shares in zip(x_BTI, shares_B, strict=True):
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for e, prob in enumerate(slow_probs(linear.router, x)):
                gate = prob if shares is None else beta * prob + (1 - beta) * shares[e]
                keep = kept_E[e]
                A = keep * linear.past_A[e] + (1 - keep) * linear.experts_A[e]
                B = keep * linear.past_B[e] + (1 - keep) * linear.experts_B[e]
                for r in range(len(A)):
                    out = out + ALPHA / total * gate * (A[r] * x).sum() * B[r]
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.booleans(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data(),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(training, experts, rank, B, T, data, seed):
    linear, means = make_linear(2, experts, rank, seed, beta=0.3, momentum=0.8)
    linear.train(training)
    means.trace.token_mask_BT = torch.ones(B, T, dtype=torch.bool)
    roles = data.draw(st.lists(st.integers(0, 2), min_size=experts, max_size=experts))
    visits = data.draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    linear.roles_E.copy_(torch.tensor(roles))
    linear.visits_KE[1] = torch.tensor(visits)
    means.nearest_B = torch.arange(B) % 2
    # Task 0 was never visited.
    shares = [v / sum(visits) for v in visits] if sum(visits) else None
    shares_B = [shares if b % 2 and not training else None for b in range(B)]
    # In training the task's own weights are read, whatever its end will keep of those before it.
    kept_E = [0.0 if training else (0.0, 1 - 0.8, 0.8)[role] for role in roles]
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, shares_B, kept_E, 0.3)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x, **{k: w for k, w in linear.named_parameters() if w.requires_grad}}
    assert set(named) == {"x", "router", "experts_A", "experts_B"}
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_visits_are_counts_of_the_top_experts_of_valid_tokens(experts, B, T, seed):
    linear, means = make_linear(experts=experts, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    means.trace.token_mask_BT = torch.rand(B, T, generator=generator) < 0.7
    x = torch.randn(B, T, 5, dtype=torch.float64, generator=generator)
    linear.train()(x)
    expected = [0] * experts
    for b in range(B):
        for t in range(T):
            probs = slow_probs(linear.router, x[b, t])
            best = sorted(range(experts), key=lambda e, probs=probs: -float(probs[e].detach()))
            for e in best[: min(2, experts)]:
                expected[e] += int(means.trace.token_mask_BT[b, t])
    assert linear.visited_E.tolist() == expected


def attached(tiny_llava, tmp_path, seed=0, **settings_):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    fields = {"tasks": list(TASKS), "num_experts": 3, "rank_total": 6, **settings_}
    config = cl_moe.Config(encoder=write_encoder(tmp_path / "encoder"), **fields)
    config.check()
    described = cl_moe.attach(model, config, trace)
    trace.watch(model)
    return model, trace, described


def linears(model):
    return [m for m in model.modules() if isinstance(m, cl_moe.MomentumExperts)]


def visited(model, visits):
    """Say that the tokens of each task, in order, visited the experts so often, in every linear."""
    for linear in linears(model):
        linear.visits_KE.copy_(torch.tensor(visits))


@pytest.mark.parametrize(
    ("visits", "roles"),
    [
        # The first task keeps nothing of before it.
        ([[5, 4, 1], [0, 0, 0], [0, 0, 0]], [0, 0, 0]),
        # Experts 0 and 1 were the first task's; of the second's 1 and 2, the 2 is its own.
        ([[5, 4, 1], [1, 7, 3], [0, 0, 0]], [2, 2, 1]),
        # All of the third task's were some task's before.
        ([[5, 4, 1], [1, 7, 3], [6, 0, 6]], [2, 2, 2]),
        # An expert without any visit is nobody's favourite.
        ([[5, 0, 0], [0, 7, 0], [0, 0, 3]], [2, 2, 1]),
    ],
)
def test_an_expert_is_specific_when_it_is_a_favourite_of_the_task_and_of_none_before(
    visits, roles, tiny_llava, tmp_path
):
    model, _, described = attached(tiny_llava, tmp_path)
    last = max(k for k in range(3) if sum(visits[k]))
    for task in TASKS[: last + 1]:
        described.on_task_start(task)
    visited(model, visits)
    described.on_task_end(TASKS[last])
    assert all(linear.roles_E.tolist() == roles for linear in linears(model))


def test_after_a_task_weights_are_mixed_with_those_before_it_and_the_next_one_starts_from_there(
    tiny_llava, tmp_path
):
    model, trace, described = attached(tiny_llava, tmp_path, momentum=0.8)
    learn(model, trace, described, TASKS[:1], lr=0.5)
    first = [(m.experts_A.detach().clone(), m.experts_B.detach().clone()) for m in linears(model)]
    described.on_task_start(TASKS[1])
    model.train()
    for _ in range(3):
        step(model, trace, described, TASKS[1], lr=0.5)
    trained = [(m.experts_A.detach().clone(), m.experts_B.detach().clone()) for m in linears(model)]
    for linear, (A, B) in zip(linears(model), first, strict=True):
        assert torch.equal(linear.past_A, A)
        assert torch.equal(linear.past_B, B)
        assert not torch.equal(linear.experts_B, B)
    visited(model, [[5, 4, 1], [1, 7, 3], [0, 0, 0]])
    described.on_task_end(TASKS[1])
    answers = logits(model, trace, TASKS[1])
    described.on_task_start(TASKS[2])
    for linear, past, now in zip(linears(model), first, trained, strict=True):
        for own, kept, old, new in zip(
            (linear.experts_A, linear.experts_B), (linear.past_A, linear.past_B), past, now, strict=True
        ):
            for e, keep in enumerate((0.8, 0.8, 1 - 0.8)):
                expected = keep * old[e] + (1 - keep) * new[e]
                torch.testing.assert_close(own[e], expected, rtol=1e-12, atol=1e-15)
                assert torch.equal(kept[e], own[e])
        assert not linear.roles_E.any()
    # Folding changes the weights' form, not what they compute.
    torch.testing.assert_close(logits(model, trace, TASKS[1]), answers, rtol=1e-9, atol=1e-11)


def test_a_task_that_has_ended_and_starts_again_starts_from_the_mixed_weights(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described, TASKS[:2], lr=0.5)
    visited(model, [[5, 4, 1], [1, 7, 3], [0, 0, 0]])
    described.on_task_end(TASKS[1])
    answers = logits(model, trace, TASKS[1])
    described.on_task_start(TASKS[1])
    for linear in linears(model):
        assert not linear.roles_E.any()
        assert torch.equal(linear.past_A, linear.experts_A)
    torch.testing.assert_close(logits(model, trace, TASKS[1]), answers, rtol=1e-9, atol=1e-11)


def test_visits_are_added_up_for_the_task_that_trains_and_for_batches_that_count(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described, TASKS[:2], num_steps=2)
    tokens = int(batch_of(TASKS[0])["attention_mask"].sum())
    for linear in linears(model):
        assert linear.visits_KE.sum(dim=1).tolist() == [2 * 2 * tokens, 2 * 2 * tokens, 0]
    described.on_task_start(TASKS[2])
    model.train()
    trace.begin(("what is this",) * 2, ("?",) * 2, counted=False)
    model(**batch_of(TASKS[2]))
    described.losses(trace)
    described.after_step(lambda part: part)
    assert not any(linear.visits_KE[2].any() for linear in linears(model))
    assert model.cl_moe_means.counts_K.tolist() == [4, 4, 0]


def test_recomputation_under_checkpointing_counts_nothing_twice(tiny_llava, tmp_path):
    found = []
    for checkpointing in (False, True):
        model, trace, described = attached(tiny_llava, tmp_path / str(checkpointing))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        learn(model, trace, described, TASKS[:1], num_steps=1)
        found.append([linear.visits_KE.tolist() for linear in linears(model)])
    assert found[0] == found[1]


def test_one_expert_equals_plain_lora(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path, num_experts=1, rank_total=2, alpha=4.0, top_k=1)
    learn(model, trace, described, TASKS[:1], lr=0.5)
    plain = tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if ".lora_A" in name:
                weight.copy_(own[name.replace("lora_A.weight", "experts_A")][0])
            elif ".lora_B" in name:
                weight.copy_(own[name.replace("lora_B.weight", "experts_B")][0].T)
        expected = plain(**batch_of(TASKS[2])).logits
    torch.testing.assert_close(logits(model, trace, TASKS[2]), expected, rtol=1e-9, atol=1e-11)


def test_weights_equal_the_formula_and_the_past_is_saved(tiny_llava, tmp_path):
    d, f, L, E, r = 16, 24, 2, 3, 2
    _, _, described = attached(tiny_llava, tmp_path)
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    assert described.num_weights == L * sum(E * r * (i + o) + E * i for i, o in shapes)
    assert described.num_active == described.num_weights
    for name in ("past_A", "past_B", "roles_E", "visits_KE"):
        assert sum(key.endswith(f".{name}") for key in described.state) == 14


def test_routers_compute_in_fp32_under_bf16():
    linear, means = make_linear(dtype=torch.bfloat16)
    means.trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    means.nearest_B = torch.tensor([0, 1])
    linear.visits_KE[1] = torch.tensor([1, 2, 1])
    x = torch.randn(2, 3, 5).bfloat16()
    out = linear.eval()(x)
    assert out.dtype == torch.bfloat16
    assert means.trace.routes[0].probs_BTE.dtype == torch.float32
    slow = slow_linear(linear.double(), x.double(), [None, [0.25, 0.5, 0.25]], [0.0] * 3, 0.5)
    assert (out.double() - slow).abs().max() < 2**-5 * slow.abs().max()


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"num_experts": 0}, "num_experts"), ({"rank_total": 6}, "rank_total"),
     ({"top_k": 5}, "top_k"), ({"beta": 1.5}, "beta"), ({"momentum": -0.1}, "momentum"), ({"alpha": 0.0}, "alpha")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    cl_moe.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=rf"adapter\.{key}: "):
        cl_moe.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_an_unknown_task_names_the_nearest_and_merging_says_why_not(tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path)
    with pytest.raises(UserError, match="did you mean 'document'"):
        described.on_task_start("documents")
    with pytest.raises(UserError, match="cannot be merged: cl_moe mixes .* for every token"):
        adapters.merge(model, described)
