"""MoELoRA against a loop over tokens and experts in float64; who hears the task loss; weights at LLaVA-7B size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from workloads.adapters import lora, moe_lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

ALPHA = 3.0


def make_linear(num_experts=3, rank=2, router_grad="dense", seed=0, dropout=0.0, leads=True):
    torch.manual_seed(seed)
    config = moe_lora.Config(
        num_experts=num_experts,
        rank_total=num_experts * rank,
        alpha=ALPHA,
        router_grad=router_grad,
        dropout=dropout,
    )
    trace = Trace()
    spot = Spot(path="q_proj", layer=0, leads=leads)
    linear = moe_lora.MixedExperts(nn.Linear(6, 4, bias=False).double(), config, trace, spot)
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.7)
    return linear, trace


def slow_probs(router, token):
    exps = [(row @ token).exp() for row in router]
    return [value / sum(exps) for value in exps]


def slow_linear(linear, x_BTI, router_grad, scale):
    """W x + scale * sum_e gate_e B_e A_e x, token by token, expert by expert, rank by rank."""
    samples = []
    for sample in x_BTI:
        tokens = []
        for token in sample:
            p = slow_probs(linear.router, token)
            best = max(range(len(p)), key=lambda e: float(p[e].detach()))
            out = linear.base_layer.weight @ token
            for e in range(len(p)):
                if router_grad == "dense":
                    gate = p[e]
                elif router_grad == "straight_through":
                    gate = float(e == best) + (p[e] - p[e].detach())
                else:
                    gate = (p[e] if router_grad == "scaled" else 1.0) if e == best else 0.0
                for r in range(linear.experts_A.shape[1]):
                    inner = (linear.experts_A[e, r] * token).sum()
                    out = out + scale * gate * inner * linear.experts_B[e, r]
            tokens.append(out)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, experts, rank, B, T, seed):
    linear, _ = make_linear(experts, rank, router_grad, seed)
    x = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    # alpha over the rank of all experts together, whatever their number.
    out, slow = linear(x), slow_linear(linear, x, router_grad, ALPHA / (experts * rank))
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    trained = {key: weight for key, weight in linear.named_parameters() if weight.requires_grad}
    assert ("router" in trained) == (router_grad != "hard")
    ours = torch.autograd.grad((out * probe).sum(), [x, *trained.values()])
    theirs = torch.autograd.grad((slow * probe).sum(), [x, *trained.values()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_router_exactly_as_declared(router_grad, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    trace.watch(model)
    config = moe_lora.Config(num_experts=2, rank_total=2, router_grad=router_grad)
    attached = moe_lora.attach(model, config, trace)
    for key, weight in model.named_parameters():
        if "experts_B" in key:
            nn.init.normal_(weight)
    model(**batch).logits.square().sum().backward()
    routers = {key: weight for key, weight in model.named_parameters() if key.endswith(".router")}
    assert len(routers) == 2 * 7
    heard = [
        weight.grad is not None and float(weight.grad.abs().max()) > 1e-12 for weight in routers.values()
    ]
    declared = attached.capabilities.router_hears_task_loss
    assert declared == (router_grad != "hard")
    assert heard == [declared] * len(routers)
    # Routers that nothing trains are saved as state.
    assert attached.state == (frozenset() if declared else frozenset(routers))


def test_an_expert_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient():
    linear, trace = make_linear(num_experts=3, router_grad="scaled")
    x = torch.randn(2, 5, 6, dtype=torch.float64).abs()
    with torch.no_grad():
        linear.router.copy_(torch.tensor([[1.0], [0.5], [-9.0]]).expand(3, 6))
    before = linear(x)
    before.sum().backward()
    assert trace.routes[0].choice_BT.eq(0).all()
    for weight in (linear.experts_A, linear.experts_B):
        assert weight.grad[0].abs().max() > 0
        assert weight.grad[1:].abs().max() == 0
    with torch.no_grad():
        linear.experts_A[1:] = 77.0
    assert torch.equal(linear(x), before)


def test_one_expert_equals_plain_lora(tiny_llava, batch):
    plain, mixed = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=5.0), Trace())
    moe_lora.attach(mixed, moe_lora.Config(num_experts=1, rank_total=2, alpha=5.0), Trace())
    target = dict(mixed.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3
            path, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            value = weight.data if factor == "A" else weight.data.T
            target[f"{path}.experts_{factor}"].data = value.unsqueeze(0).clone()
    with torch.no_grad():
        ours, theirs = mixed(**batch).logits, plain(**batch).logits
        assert (theirs - tiny_llava()(**batch).logits).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_sample_alone_and_padded_gives_the_same_outputs():
    linear, _ = make_linear()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x[1, 3:] = 0
    torch.testing.assert_close(linear(x)[1:2, :3], linear(x[1:2, :3]), rtol=1e-12, atol=1e-12)


def test_router_computes_in_fp32_under_bf16():
    torch.manual_seed(0)
    trace, spot = Trace(), Spot(path="q_proj", layer=0, leads=True)
    base = nn.Linear(32, 8, bias=False).bfloat16()
    linear = moe_lora.MixedExperts(base, moe_lora.Config(), trace, spot)
    nn.init.normal_(linear.router)
    x = torch.randn(2, 3, 32).bfloat16()
    assert linear(x).dtype == torch.bfloat16
    probs = trace.routes[0].probs_BTE
    assert probs.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            exact = torch.stack(slow_probs(linear.router.double(), x[b, t].double()))
            torch.testing.assert_close(probs[b, t].double(), exact, rtol=1e-4, atol=1e-6)


def test_each_block_reports_the_router_of_its_first_linear(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    moe_lora.attach(model, moe_lora.Config(num_experts=2, rank_total=2), trace)
    seen = []
    model.model.language_model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: seen.append(torch.stack(slow_probs(module.router, args[0][1, 4])))
    )
    with torch.no_grad():
        model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    torch.testing.assert_close(trace.routes[1].probs_BTE[1, 4], seen[0], rtol=1e-9, atol=1e-12)


def test_dropout_is_drawn_per_expert_in_training_and_off_in_evaluation():
    linear, _ = make_linear(num_experts=2, rank=1, dropout=0.5)
    with torch.no_grad():
        linear.experts_A[1] = linear.experts_A[0]
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    first, second = linear._inner(x).unbind(-1)
    assert not torch.equal(first, second)
    linear.eval()
    first, second = linear._inner(x).unbind(-1)
    assert torch.equal(first, second)


def test_weights_at_llava_7b_size_equal_the_published_count():
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    attached = moe_lora.attach(model, moe_lora.Config(rank_total=128, num_experts=8), Trace())
    outs_and_ins = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    exact = 32 * sum(128 * (o + i) + 8 * i for o, i in outs_and_ins)
    assert attached.num_weights == exact
    assert round(attached.num_weights / 1e6, 1) == 328.9
    assert attached.num_active == exact


def test_active_weights_are_one_expert_and_the_routers_when_one_is_chosen(tiny_llava):
    d, f, L, E, r = 16, 24, 2, 2, 3
    config = moe_lora.Config(num_experts=E, rank_total=E * r, router_grad="scaled")
    attached = moe_lora.attach(tiny_llava(), config, Trace())
    one_expert, routers = L * r * (4 * 2 * d + 3 * (d + f)), L * E * (6 * d + f)
    assert attached.num_weights == E * one_expert + routers
    assert attached.num_active == one_expert + routers


def test_a_rank_that_does_not_divide_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"adapter\.rank_total: 7 is not allowed; a multiple of .*\(2\)"):
        moe_lora.Config(num_experts=2, rank_total=7).check()
    with pytest.raises(UserError, match=r"adapter\.targets: 'gate' .*did you mean 'gate_proj'"):
        moe_lora.Config(targets=["gate"]).check()


def test_plain_form_is_refused_with_the_reason(tiny_llava):
    attached = moe_lora.attach(tiny_llava(), moe_lora.Config(), Trace())
    assert isinstance(attached.as_lora, str)
    assert "every token" in attached.as_lora
