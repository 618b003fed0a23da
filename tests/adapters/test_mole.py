"""MoLE against a loop over tokens and experts in float64; which losses reach the router."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workloads.adapters import lora, mole
from workloads.adapters.base import Trace
from workloads.routing import ROUTER_GRADS


class TinyMLP(nn.Module):
    """Llama's MLP at width 5, hidden width 7."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(5, 7, bias=False)
        self.up_proj = nn.Linear(5, 7, bias=False)
        self.down_proj = nn.Linear(7, 5, bias=False)
        self.act_fn = nn.SiLU()


def make_block(num_experts=3, rank=2, router_grad="hard", seed=0):
    torch.manual_seed(seed)
    config = mole.Config(num_experts=num_experts, rank_per_expert=rank, alpha=3.0, router_grad=router_grad)
    trace = Trace()
    block = mole.MoLEBlock(TinyMLP().double(), config, trace, layer=0)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    return block, trace


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


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5),
    st.integers(0, 99),
)  # fmt: skip
def test_block_equals_a_loop_forward_and_backward(router_grad, experts, rank, B, T, seed):
    block, _ = make_block(experts, rank, router_grad, seed)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = block(x), slow_block(block, x, router_grad, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {
        "x": x,
        **{k: w for k, w in block.named_parameters() if router_grad != "hard" or "router" not in k},
    }
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values(), allow_unused=True)
    for (key, weight), a, b in zip(named.items(), ours, theirs, strict=True):
        # The loop never touches an expert that nobody visits; stacked, its gradient is there and is 0.
        assert b is not None or "experts" in key, key
        torch.testing.assert_close(a, torch.zeros_like(weight) if b is None else b, rtol=1e-9, atol=1e-11)


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


def test_an_expert_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient():
    block, trace = make_block(num_experts=3)
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.bias.copy_(torch.tensor([1.0, 0.0, -9.0]))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    before = block(x)
    before.sum().backward()
    assert trace.routes[0].choice_BT.eq(0).all()
    for linear in (block.gate_proj, block.up_proj, block.down_proj):
        assert linear.experts_A.grad[1:].abs().max() == 0
        assert linear.experts_B.grad[1:].abs().max() == 0
    with torch.no_grad():
        block.gate_proj.experts_A[1:] = 77.0
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
