"""MoLE against a loop over tokens and experts in float64, however it computes; which losses reach the router."""

import copy
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workloads.adapters import lora, mole
from workloads.adapters.base import Trace
from workloads.adapters.parts import experts
from workloads.routing import ROUTER_GRADS

BACKENDS = ("dense_mask", "sorted_slices", "grouped_mm")


class TinyMLP(nn.Module):
    """Llama's MLP, at width 5 and hidden width 7 if nothing else is said."""

    def __init__(self, width=5, hidden=7):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()


def make_block(num_experts=3, rank=2, router_grad="hard", seed=0, sizes=(5, 7), dtype=torch.float64):
    torch.manual_seed(seed)
    config = mole.Config(num_experts=num_experts, rank_per_expert=rank, alpha=3.0, router_grad=router_grad)
    trace = Trace()
    block = mole.MoLEBlock(TinyMLP(*sizes).to(dtype), config, trace, layer=0)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    return block, trace


@contextmanager
def computed_by(backend):
    """All passes are computed in one way, however few their tokens; modes that need all experts are dense anyway."""
    with (
        patch.object(experts, "choose", return_value=backend),
        patch.object(experts, "enough", return_value=True),
    ):
        yield


def slow_block(block, x_BTD, router_grad, scale):
    """Token by token and expert by expert, from the equations; a gate's value and its gradient path are explicit."""

    def adapted(linear, token, gates):
        out = linear.base_layer.weight @ token
        for e, gate in enumerate(gates):
            if isinstance(gate, float) and gate == 0.0:
                continue
            out = out + gate * scale * (linear.experts_B[e].T @ (linear.experts_A[e] @ token))
        return out

    rows = []
    for sample in x_BTD:
        tokens = []
        for token in sample:
            z = block.router.weight @ token + block.router.bias
            p = (z - z.max()).exp()
            p = p / p.sum()
            best = max(range(len(p)), key=lambda e: float(p[e].detach()))
            if router_grad == "dense":
                gates = list(p)
            elif router_grad == "hard":
                gates = [1.0 if e == best else 0.0 for e in range(len(p))]
            elif router_grad == "scaled":
                gates = [p[e] if e == best else 0.0 for e in range(len(p))]
            else:
                gates = [float(e == best) + (p[e] - p[e].detach()) for e in range(len(p))]
            hidden = F.silu(adapted(block.gate_proj, token, gates)) * adapted(block.up_proj, token, gates)
            tokens.append(adapted(block.down_proj, hidden, gates))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def trained(block, x, router_grad):
    """What has a gradient of the task loss."""
    named = {k: w for k, w in block.named_parameters() if w.requires_grad}
    return {
        "x": x,
        **{k: w for k, w in named.items() if router_grad != "hard" or "router" not in k},
    }


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.sampled_from(("dense_mask", "sorted_slices")), st.integers(1, 4),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99),
)  # fmt: skip
def test_block_equals_a_loop_forward_and_backward(router_grad, backend, num_experts, rank, B, T, seed):
    block, _ = make_block(num_experts, rank, router_grad, seed)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    with computed_by(backend):
        out = block(x)
    slow = slow_block(block, x, router_grad, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = trained(block, x, router_grad)
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values(), allow_unused=True)
    for (key, weight), a, b in zip(named.items(), ours, theirs, strict=True):
        # The loop never touches an expert that nobody visits; stacked, its gradient is there and is 0.
        assert b is not None or "experts" in key, key
        torch.testing.assert_close(a, torch.zeros_like(weight) if b is None else b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router_grad", ["hard", "scaled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_fp32_every_backend_is_as_near_to_the_loop_as_fp32_allows(backend, router_grad):
    """Widths and rank are such that grouped products take them; experts have 0, 1 and many tokens."""
    block, trace = make_block(4, 4, router_grad, sizes=(8, 12), dtype=torch.float32)
    x = torch.randn(2, 9, 8, requires_grad=True)
    with torch.no_grad():
        block.router.weight.mul_(3)
        block.router.bias.copy_(torch.tensor([2.0, 1.0, -99.0, 0.0]))
    exact = copy.deepcopy(block).double()
    exact_x = x.detach().double().requires_grad_()
    with computed_by(backend):
        out = block(x)
    slow = slow_block(exact, exact_x, router_grad, 3.0 / 4)
    assert (trace.routes[0].choice_BT != 2).all()
    torch.testing.assert_close(out.double(), slow, rtol=1e-5, atol=1e-5)
    named, named_exact = trained(block, x, router_grad), trained(exact, exact_x, router_grad)
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad(
        (slow * probe.double()).sum(), named_exact.values(), allow_unused=True, materialize_grads=True
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router_grad", ["hard", "scaled"])
def test_sorting_changes_neither_loss_nor_gradients_of_a_model(router_grad, checkpointing, tiny_llava, batch):
    results = []
    for backend in ("dense_mask", "sorted_slices"):
        model, trace = tiny_llava().train(), Trace()
        torch.manual_seed(0)
        attached = mole.attach(model, mole.Config(router_grad=router_grad, rank_per_expert=2), trace)
        trace.watch(model)
        weights = [w for w in model.parameters() if w.requires_grad]
        for weight in weights:
            nn.init.normal_(weight, std=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with computed_by(backend):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
            loss = loss + attached.losses(trace)["balance_loss"]
            results.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    for dense, by_slices in zip(*results, strict=True):
        torch.testing.assert_close(dense, by_slices, rtol=1e-9, atol=1e-12)


def test_in_bf16_every_backend_is_as_near_to_float64_as_bf16_allows():
    block, _ = make_block(3, 8, "scaled", sizes=(16, 24), dtype=torch.bfloat16)
    x = torch.randn(2, 9, 16, dtype=torch.bfloat16)
    exact = copy.deepcopy(block).double()(x.double()).detach()
    for backend in BACKENDS:
        with computed_by(backend):
            out = block(x).detach()
        assert out.dtype == torch.bfloat16
        assert float((out.double() - exact).norm() / exact.norm()) < 0.02, backend


@pytest.mark.parametrize(
    ("device", "dtype", "num_experts", "rank", "expected"),
    [
        ("cpu", torch.float32, 4, 8, "dense_mask"),
        ("cpu", torch.float32, 3, 11, "sorted_slices"),
        ("cpu", torch.bfloat16, 8, 64, "sorted_slices"),
        ("cuda", torch.bfloat16, 8, 32, "dense_mask"),
        ("cuda", torch.bfloat16, 8, 64, "grouped_mm"),
        ("cuda", torch.bfloat16, 8, 33, "dense_mask"),
        ("cuda", torch.float32, 8, 64, "dense_mask"),
        ("meta", torch.float32, 8, 64, "dense_mask"),
    ],
)
def test_the_backend_follows_from_device_and_size(device, dtype, num_experts, rank, expected):
    assert experts.choose(torch.device(device), dtype, num_experts, rank) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router_grad": "hard"}, "sorted_slices"),
        ({"router_grad": "scaled"}, "sorted_slices"),
        ({"router_grad": "straight_through"}, "dense_mask"),
        ({"router_grad": "dense"}, "dense_mask"),
        ({"dropout": 0.1}, "dense_mask"),
        ({"rank_per_expert": 2}, "dense_mask"),
    ],
)
def test_the_backend_that_is_told_is_the_one_that_computes(settings, expected, tiny_llava, batch):
    model, trace = tiny_llava().train(), Trace()
    attached = mole.attach(model, mole.Config(**{"rank_per_expert": 16, **settings}), trace)
    trace.watch(model)
    assert attached.backend() == expected
    with patch.object(experts, "visits", wraps=experts.visits) as sort:
        many = {key: torch.cat([value] * 8) for key, value in batch.items()}
        model(**many)
        assert sort.call_count == (2 if expected == "sorted_slices" else 0)
        sort.reset_mock()
        model(**batch)
        assert sort.call_count == 0, "so few tokens are not worth sorting"


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_router_exactly_as_declared(router_grad):
    block, _ = make_block(router_grad=router_grad)
    block(torch.randn(2, 4, 5, dtype=torch.float64)).square().sum().backward()
    gradient = block.router.weight.grad
    heard = gradient is not None and float(gradient.abs().max()) > 1e-9
    assert heard == (router_grad != "hard")


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_balance_loss_reaches_the_router_in_every_mode(router_grad, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    trace.watch(model)
    attached = mole.attach(model, mole.Config(router_grad=router_grad, rank_per_expert=1), trace)
    model(**batch)
    attached.losses(trace)["balance_loss"].backward()
    routers = [w for name, w in model.named_parameters() if name.endswith("mlp.router.weight")]
    assert len(routers) == 2
    assert all(float(w.grad.abs().max()) > 0 for w in routers)


@pytest.mark.parametrize("backend", ["dense_mask", "sorted_slices"])
def test_an_expert_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient(backend):
    block, trace = make_block(num_experts=3)
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.bias.copy_(torch.tensor([1.0, 0.0, -9.0]))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    with computed_by(backend):
        before = block(x)
        before.sum().backward()
    assert trace.routes[0].choice_BT.eq(0).all()
    for linear in (block.gate_proj, block.up_proj, block.down_proj):
        assert linear.experts_A.grad[1:].abs().max() == 0
        assert linear.experts_B.grad[1:].abs().max() == 0
    with torch.no_grad():
        block.gate_proj.experts_A[1:] = 77.0
    with computed_by(backend):
        assert torch.equal(block(x), before)


def test_one_expert_equals_plain_lora(tiny_llava, batch):
    plain, mixed = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    mole.attach(mixed, mole.Config(num_experts=1, rank_per_expert=2, alpha=4.0), Trace())
    generator = torch.Generator().manual_seed(5)
    source = dict(mixed.named_parameters())
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3
            if ".mlp." in name:
                linear, factor = name.rsplit(".lora_", 1)
                target = source[f"{linear}.experts_{factor[0]}"]
                target.data = (weight.data if factor[0] == "A" else weight.data.T).unsqueeze(0).clone()
            else:
                source[name].data = weight.data.clone()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, mixed(**batch).logits, rtol=1e-9, atol=1e-9)


def test_weights_equal_the_published_formula(tiny_llava):
    d, f, L, E, r = 16, 24, 2, 3, 2
    model = tiny_llava()
    attached = mole.attach(model, mole.Config(num_experts=E, rank_per_expert=r), Trace())
    attention, experts, routers = L * r * 8 * d, E * L * r * 3 * (d + f), L * (d * E + E)
    assert attached.num_weights == attention + experts + routers
    assert attached.num_active == attention + experts // E + routers


def test_dropout_is_off_in_evaluation_and_on_in_training():
    torch.manual_seed(0)
    block = mole.MoLEBlock(TinyMLP().double(), mole.Config(rank_per_expert=2, dropout=0.5), Trace(), layer=0)
    for weight in block.parameters():
        nn.init.normal_(weight)
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
