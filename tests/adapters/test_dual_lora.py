"""Dual-LoRA against a loop over tokens and rank dimensions in float64; LayerNorm under bf16; weights at 7B size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from workloads.adapters import dual_lora
from workloads.adapters.base import Trace
from workloads.errors import UserError

ALPHA = 3.0


def make_linear(rank=3, seed=0, dtype=torch.float64, width=6, dropout=0.0):
    torch.manual_seed(seed)
    config = dual_lora.Config(rank=rank, alpha=ALPHA, dropout=dropout)
    linear = dual_lora.DualLinear(nn.Linear(width, 4, bias=False).to(dtype), config)
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.7)
    return linear


def slow_update(linear, token, rank):
    """u * v of one token: normalised skill space times rectified task space."""
    S, T = linear.skill_and_task
    skill = [(S[r] * token).sum() for r in range(rank)]
    task = [(T[r] * token).sum() for r in range(rank)]
    mean = sum(skill) / rank
    variance = sum((s - mean) ** 2 for s in skill) / rank
    u = [
        (s - mean) / (variance + 1e-5).sqrt() * w + b
        for s, w, b in zip(skill, linear.norm_weight, linear.norm_bias, strict=True)
    ]
    return [a * (t if t > 0 else 0 * t) for a, t in zip(u, task, strict=True)]


def slow_linear(linear, x_BTI, rank):
    samples = []
    for sample in x_BTI:
        tokens = []
        for token in sample:
            out = linear.base_layer.weight @ token
            for r, value in enumerate(slow_update(linear, token, rank)):
                out = out + ALPHA / rank * value * linear.out[r]
            tokens.append(out)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_linear_equals_a_loop_forward_and_backward(rank, B, T, seed):
    linear = make_linear(rank, seed)
    x = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    weights = [x, *linear.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), weights)
    theirs = torch.autograd.grad((slow * probe).sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_rank_dimension_that_the_task_space_closes_changes_nothing_and_gets_a_zero_gradient():
    linear = make_linear(rank=3)
    x = torch.randn(2, 4, 6, dtype=torch.float64).abs()
    with torch.no_grad():
        linear.skill_and_task[1, 2] = -1.0
    before = linear(x)
    before.sum().backward()
    assert linear.out.grad[:2].abs().max() > 0
    assert linear.out.grad[2].abs().max() == 0
    assert linear.skill_and_task.grad[1, 2].abs().max() == 0
    with torch.no_grad():
        linear.out[2] = 77.0
    assert torch.equal(linear(x), before)


def test_a_larger_skill_space_does_not_enlarge_the_update():
    linear = make_linear(rank=4)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    before = linear(x)
    with torch.no_grad():
        linear.skill_and_task[0] *= 1000
    assert (linear(x) - before).abs().max() < 1e-2 * before.abs().max()


def test_layernorm_computes_in_fp32_under_bf16():
    linear = make_linear(rank=32, dtype=torch.bfloat16, width=64)
    x = torch.randn(1, 3, 64).bfloat16()
    with torch.no_grad():
        linear.base_layer.weight.zero_()
        linear.out.zero_()
        linear.out[0] = 1.0
        assert linear(x).dtype == torch.bfloat16
        # The projections are rounded to bf16, all that follows is not: one rounding of the product.
        skill, task = linear._spaces(x)
        u = nn.functional.layer_norm(
            skill.double(), (32,), linear.norm_weight.double(), linear.norm_bias.double(), 1e-5
        )
        exact = (u * task.double().relu() * (ALPHA / 32))[0, :, 0]
        inner = linear(x)[0, :, 0].double()
    torch.testing.assert_close(inner, exact, rtol=2**-8, atol=1e-9)


def test_padding_and_batching_change_nothing():
    linear = make_linear()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(x)[1:2, :3], linear(x[1:2, :3]), rtol=1e-12, atol=1e-12)


def test_dropout_is_drawn_on_the_skill_space_alone_and_off_in_evaluation():
    linear = make_linear(dropout=0.5)
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    linear.eval()
    exact_skill, exact_task = linear._spaces(x)
    linear.train()
    skill, task = linear._spaces(x)
    torch.testing.assert_close(task, exact_task, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(skill, exact_skill)
    linear.eval()
    torch.testing.assert_close(linear(x), slow_linear(linear, x, 3), rtol=1e-10, atol=1e-12)


def test_by_default_query_and_value_are_adapted_and_nothing_is_routed(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    described = dual_lora.attach(model, dual_lora.Config(), trace)
    paths = [name for name, module in model.named_modules() if isinstance(module, dual_lora.DualLinear)]
    assert [path.rsplit(".", 1)[-1] for path in paths] == ["q_proj", "v_proj"] * 2
    model(**batch)
    assert trace.routes == []
    assert described.capabilities.routing == "none"
    assert described.state == frozenset()


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
    described = dual_lora.attach(model, dual_lora.Config(rank=32, alpha=64.0), Trace())
    assert described.num_weights == 64 * (32 * (2 * 4096 + 4096) + 2 * 32)
    assert round(described.num_weights / 1e6, 2) == 25.17
    assert described.num_active == described.num_weights


def test_rank_one_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"adapter\.rank: 1 is not allowed; a whole number of 2 or more"):
        dual_lora.Config(rank=1).check()


def test_plain_form_is_refused_with_the_reason(tiny_llava):
    described = dual_lora.attach(tiny_llava(), dual_lora.Config(), Trace())
    assert isinstance(described.as_lora, str)
    assert "depend on the token" in described.as_lora
