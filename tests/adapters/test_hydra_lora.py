"""HydraLoRA against loops over tokens, B's and ranks in float64; who hears the task loss; its weights and memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.folder_tools import draw
from workloads.adapters import hydra_lora, lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError

ALPHA = 3.0
GRADS = ("hard", "scaled", "straight_through", "dense")
SPOT = Spot(path="q_proj", layer=0, leads=True)


def make_linear(inputs=6, outputs=4, experts=3, rank=2, seed=0, dtype=torch.float64, **fields):
    torch.manual_seed(seed)
    config = hydra_lora.Config(num_experts=experts, rank_per_expert=rank, alpha=ALPHA, **fields)
    trace = Trace()
    base = nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False)
    linear = hydra_lora.HydraLinear(base, config, trace, SPOT)
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.7)
    return linear, trace


def slow_probs(router, token):
    exps = [(row * token).sum().exp() for row in router]
    return [value / sum(exps) for value in exps]


def slow_gate(probs, e, router_grad):
    """Weight of B number e, from what the four modes mean."""
    best = max(range(len(probs)), key=lambda i: float(probs[i].detach()))
    if router_grad == "dense":
        return probs[e]
    if router_grad == "straight_through":
        return float(e == best) + (probs[e] - probs[e].detach())
    if e != best:
        return 0.0
    return probs[e] if router_grad == "scaled" else 1.0


def slow_linear(W, router, A, B, x_BTI, router_grad, scale):
    """W x + scale * sum_e gate_e B_e A x, token by token, B by B, rank by rank."""
    samples = []
    for sample in x_BTI:
        tokens = []
        for token in sample:
            probs = slow_probs(router, token)
            out = torch.stack([(row * token).sum() for row in W])
            for e in range(len(B)):
                gate = slow_gate(probs, e, router_grad)
                for r in range(len(A)):
                    out = out + scale * gate * (A[r] * token).sum() * B[e, r]
            tokens.append(out)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(GRADS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5),
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, experts, rank, inputs, outputs, B, T, seed):
    linear, _ = make_linear(inputs, outputs, experts, rank, seed, router_grad=router_grad)
    x = torch.randn(B, T, inputs, dtype=torch.float64, requires_grad=True)
    out = linear(x)
    # alpha over the rank of A, whatever the number of B's.
    slow = slow_linear(
        linear.base_layer.weight, linear.router, linear.lora_A, linear.experts_B, x, router_grad, ALPHA / rank
    )
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x, **{k: w for k, w in linear.named_parameters() if w.requires_grad}}
    assert set(named) - {"router"} == {"x", "lora_A", "experts_B"}
    assert ("router" in named) == (router_grad != "hard")
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("router_grad", ["hard", "scaled"])
def test_a_b_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient(router_grad):
    linear, trace = make_linear(router_grad=router_grad)
    x = torch.randn(2, 5, 6, dtype=torch.float64).abs()
    with torch.no_grad():
        linear.router.copy_(torch.tensor([[1.0], [0.5], [-9.0]]).expand(3, 6))
    before = linear(x)
    before.sum().backward()
    assert trace.routes[0].choice_BT.eq(0).all()
    assert linear.experts_B.grad[0].abs().max() > 0
    assert linear.experts_B.grad[1:].abs().max() == 0
    # A is everyone's.
    assert linear.lora_A.grad.abs().min() > 0
    with torch.no_grad():
        linear.experts_B[1:] = 77.0
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("router_grad", GRADS)
def test_one_b_equals_plain_lora(router_grad, tiny_llava, batch):
    plain, hydra = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=5.0), Trace())
    config = hydra_lora.Config(num_experts=1, rank_per_expert=2, alpha=5.0, router_grad=router_grad)
    hydra_lora.attach(hydra, config, Trace())
    draw(plain, 5)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in hydra.named_parameters():
            if name.endswith("lora_A"):
                weight.copy_(source[f"{name}.weight"])
            elif name.endswith("experts_B"):
                weight[0] = source[name.replace("experts_B", "lora_B.weight")].T
        ours, theirs = hydra(**batch).logits, plain(**batch).logits
        assert (theirs - tiny_llava()(**batch).logits).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router_grad", ["hard", "straight_through", "dense"])
def test_equal_bs_equal_one_whatever_the_router_says_and_share_a_dropout_mask(router_grad):
    linear, trace = make_linear(experts=3, rank=2, router_grad=router_grad, dropout=0.5)
    with torch.no_grad():
        linear.experts_B[1:] = linear.experts_B[0]
    x = torch.randn(2, 8, 6, dtype=torch.float64)

    def plain(shown):
        return x @ linear.base_layer.weight.T + ALPHA / 2 * shown @ linear.lora_A.T @ linear.experts_B[0]

    torch.manual_seed(7)
    kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(7)
    torch.testing.assert_close(linear(x), plain(kept * x), rtol=1e-10, atol=1e-12)
    # The router hears what is not dropped.
    exact_E = torch.stack(slow_probs(linear.router, x[1, 4]))
    torch.testing.assert_close(trace.routes[0].probs_BTE[1, 4], exact_E, rtol=1e-9, atol=1e-12)
    linear.eval()
    torch.testing.assert_close(linear(x), plain(x), rtol=1e-10, atol=1e-12)


def test_padding_and_the_other_sample_change_neither_outputs_nor_gradients():
    linear, _ = make_linear()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x[1, 3:] = 1e3
    weights = [linear.router, linear.lora_A, linear.experts_B]
    together, alone = linear(x)[1:2, :3], linear(x[1:2, :3])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(together.square().sum(), weights)
    theirs = torch.autograd.grad(alone.square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router_grad", GRADS)
def test_router_computes_in_fp32_under_bf16(router_grad):
    linear, trace = make_linear(32, 8, experts=4, rank=2, dtype=torch.bfloat16, router_grad=router_grad)
    x = torch.randn(2, 3, 32).bfloat16()
    out = linear(x)
    assert out.dtype == torch.bfloat16
    probs = trace.routes[0].probs_BTE
    assert probs.dtype == torch.float32
    exact = [[torch.stack(slow_probs(linear.router.double(), token)) for token in row] for row in x.double()]
    exact_BTE = torch.stack([torch.stack(row) for row in exact])
    # bf16 scores would be wrong by about 1e-2.
    torch.testing.assert_close(probs.double(), exact_BTE, rtol=1e-4, atol=1e-6)
    W, A, B = (w.double() for w in (linear.base_layer.weight, linear.lora_A, linear.experts_B))
    slow = slow_linear(W, linear.router.double(), A, B, x.double(), router_grad, ALPHA / 2)
    # A handful of roundings to 8 bits, relative to the largest output.
    assert (out.double() - slow).abs().max() < 2**-6 * slow.abs().max()


@pytest.mark.parametrize("router_grad", GRADS)
def test_task_loss_reaches_the_router_exactly_as_declared(router_grad, tiny_llava, batch):
    model = tiny_llava()
    config = hydra_lora.Config(num_experts=2, rank_per_expert=1, router_grad=router_grad)
    attached = hydra_lora.attach(model, config, Trace())
    for name, weight in model.named_parameters():
        if "experts_B" in name:
            nn.init.normal_(weight)
    model(**batch).logits.square().sum().backward()
    routers = {name: weight for name, weight in model.named_parameters() if name.endswith(".router")}
    assert len(routers) == 2 * 7
    heard = [w.grad is not None and float(w.grad.abs().max()) > 1e-12 for w in routers.values()]
    declared = attached.capabilities.router_hears_task_loss
    assert declared == (router_grad != "hard")
    assert heard == [declared] * len(routers)
    # Routers that nothing trains are saved as state.
    assert attached.state == (frozenset() if declared else frozenset(routers))


def test_the_bs_learn_apart_from_the_first_step_on():
    torch.manual_seed(0)
    linear = hydra_lora.HydraLinear(nn.Linear(6, 4, bias=False), hydra_lora.Config(), Trace(), SPOT)
    linear(torch.randn(2, 3, 6)).square().sum().backward()
    gradients = linear.experts_B.grad
    assert float((gradients[0] - gradients[1]).abs().max()) > 0.01 * float(gradients.abs().max()) > 0


def test_each_block_reports_the_router_of_its_first_linear(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    hydra_lora.attach(model, hydra_lora.Config(num_experts=2, rank_per_expert=1), trace)
    seen = []
    model.model.language_model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: seen.append(torch.stack(slow_probs(module.router, args[0][1, 4])))
    )
    with torch.no_grad():
        model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    torch.testing.assert_close(trace.routes[1].probs_BTE[1, 4], seen[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("router_grad", GRADS)
def test_no_token_keeps_a_b_of_its_own_nor_the_outputs_of_every_b(router_grad):
    """Either would take more than another input's worth of numbers for every token, be it in forward or backward."""
    linear, _ = make_linear(inputs=64, outputs=64, experts=4, rank=2, router_grad=router_grad)
    x = torch.randn(2, 100, 64, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = linear(x)
    assert out.requires_grad
    numbers = sum(tensor.untyped_storage().nbytes() // 8 for tensor in kept.values())
    weights = sum(weight.numel() for weight in linear.parameters())
    assert x.numel() <= numbers <= weights + 2 * x.numel()


@pytest.mark.parametrize("router_grad", GRADS)
def test_weights_are_one_a_all_bs_and_a_router_without_bias_per_linear(router_grad, tiny_llava):
    d, f, L, E, R = 16, 24, 2, 3, 2
    config = hydra_lora.Config(num_experts=E, rank_per_expert=R, router_grad=router_grad)
    attached = hydra_lora.attach(tiny_llava(), config, Trace())
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    router = 0 if router_grad == "hard" else E
    visited = E if router_grad == "dense" else 1
    assert attached.num_weights == L * sum(i * R + E * R * o + router * i for i, o in shapes)
    assert attached.num_active == L * sum(i * R + visited * R * o + router * i for i, o in shapes)


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"num_experts": 0}, "num_experts"), ({"rank_per_expert": 0}, "rank_per_expert"), ({"alpha": 0.0}, "alpha"),
     ({"dropout": 1.0}, "dropout"), ({"targets": []}, "targets"), ({"targets": ["gate"]}, "targets")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    hydra_lora.Config().check()
    with pytest.raises(UserError, match=rf"adapter\.{key}: "):
        hydra_lora.Config(**fields).check()


def test_plain_form_is_refused_with_the_reason(tiny_llava):
    attached = hydra_lora.attach(tiny_llava(), hydra_lora.Config(), Trace())
    assert isinstance(attached.as_lora, str)
    assert "every token" in attached.as_lora
