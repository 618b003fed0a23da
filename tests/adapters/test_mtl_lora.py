"""MTL-LoRA against loops over samples, tokens and B's in float64; one plain LoRA per task."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.decoding import decoded
from tests.adapters.folder_tools import add_plain, draw
from workloads.adapters import lora, mtl_lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.adapters.parts.tasks import TaskIds
from workloads.errors import UserError

NAMES = ["general", "document", "biomedical", "maps"]
SPOT = Spot(path="q_proj", layer=0, leads=True)


def make_linear(num_tasks=3, experts=3, rank=2, seed=0, dtype=torch.float64, **fields):
    torch.manual_seed(seed)
    config = mtl_lora.Config(
        tasks=NAMES[:num_tasks], num_experts=experts, rank_per_expert=rank, alpha=3.0, tau=0.4, **fields
    )
    trace = Trace()
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    linear = mtl_lora.TaskLoRA(base, config, trace, TaskIds(trace, config.tasks), SPOT)
    draw(linear, seed, 0.7)
    return linear, trace


def slow_linear(linear, x_BTI, ids, scale, tau):
    """Sample by sample, token by token, B by B, from the equation."""
    A, Lambda, mix, B = linear.lora_A, linear.task_Lambda, linear.task_mix, linear.experts_B
    rows = []
    for sample, t in zip(x_BTI, ids, strict=True):
        exps = [(w / tau).exp() for w in mix[t]]
        tokens = []
        for x in sample:
            u = torch.stack([(row * x).sum() for row in A])
            v = torch.stack([(Lambda[t, r] * u).sum() for r in range(len(u))])
            out = linear.base_layer.weight @ x
            for e, weight in enumerate(exps):
                for r in range(len(v)):
                    out = out + scale * weight / sum(exps) * B[e, r] * v[r]
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(num_tasks, experts, rank, B, T, seed):
    linear, trace = make_linear(num_tasks, experts, rank, seed)
    ids = [(seed + 2 * b) % num_tasks for b in range(B)]
    trace.begin(["?"] * B, [NAMES[i] for i in ids])
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, ids, 3.0 / rank, 0.4)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x, **{k: w for k, w in linear.named_parameters() if w.requires_grad}}
    assert set(named) == {"x", "lora_A", "task_Lambda", "task_mix", "experts_B"}
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


def test_a_task_without_samples_changes_nothing_and_gets_a_zero_gradient():
    linear, trace = make_linear()
    trace.begin(["?"] * 2, ["general", "biomedical"])
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    before = linear(x)
    before.sum().backward()
    assert not linear.task_Lambda.grad[1].any()
    assert not linear.task_mix.grad[1].any()
    with torch.no_grad():
        linear.task_Lambda[1] = 77.0
    assert torch.equal(linear(x), before)


def test_the_bs_learn_apart_from_the_first_step_on():
    torch.manual_seed(0)
    trace = Trace()
    config = mtl_lora.Config(tasks=NAMES)
    linear = mtl_lora.TaskLoRA(nn.Linear(5, 4, bias=False), config, trace, TaskIds(trace, NAMES), SPOT)
    trace.begin(["?"] * 2, NAMES[:2])
    linear(torch.randn(2, 3, 5)).square().sum().backward()
    gradients = linear.experts_B.grad
    assert float((gradients[0] - gradients[1]).abs().max()) > 0.01 * float(gradients.abs().max()) > 0


def test_one_b_and_an_identity_lambda_equal_plain_lora(tiny_llava, batch):
    plain, tasked, trace = tiny_llava(), tiny_llava(), Trace()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    config = mtl_lora.Config(tasks=["only"], num_experts=1, rank_per_expert=2, alpha=4.0)
    mtl_lora.attach(tasked, config, trace)
    trace.begin(["?"] * 2, ["only"] * 2)
    draw(plain, 5)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in tasked.named_parameters():
            if name.endswith("lora_A"):
                weight.copy_(source[f"{name}.weight"])
            elif name.endswith("experts_B"):
                weight[0] = source[name.replace("experts_B", "lora_B.weight")].T
        torch.testing.assert_close(plain(**batch).logits, tasked(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("task", NAMES[:3])
def test_the_plain_lora_of_a_task_equals_the_forward(task, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    attached = mtl_lora.attach(model, mtl_lora.Config(tasks=NAMES[:3], rank_per_expert=2), trace)
    draw(model, 3)
    trace.begin(["?"] * 2, [task] * 2)
    with torch.no_grad():
        ours = add_plain(tiny_llava(), attached.as_lora(task))(**batch).logits
        torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-9, atol=1e-9)


def test_decoding_and_padding_keep_every_samples_task(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    mtl_lora.attach(model, mtl_lora.Config(tasks=NAMES, rank_per_expert=2), trace)
    trace.watch(model)
    draw(model, 3)
    trace.begin(["?"] * 2, ["maps", "general"])
    ids = batch["input_ids"]
    with torch.no_grad():
        full = model(**batch).logits
        pixels = batch["pixel_values"]
        steps = decoded(model, ids[:, :9], pixels, 7)
        torch.testing.assert_close(steps, full[:, :9], rtol=1e-9, atol=1e-11)
        trace.begin(["?"], ["general"])
        alone = model(input_ids=ids[1:, :9], pixel_values=pixels[1:]).logits
        torch.testing.assert_close(alone[0], full[1, :9], rtol=1e-9, atol=1e-11)


def test_an_unknown_task_names_the_nearest_and_a_missing_one_is_told():
    linear, trace = make_linear()
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    trace.begin(["?"], ["documents"])
    with pytest.raises(UserError, match="'documents' is not allowed.*did you mean 'document'"):
        linear(x)
    trace.begin(["?"], [])
    with pytest.raises(UserError, match="needs one for each of 1 samples"):
        linear(x)


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"tasks": ["a", "a"]}, "tasks"), ({"tau": 0.0}, "tau"),
     ({"num_experts": 0}, "num_experts"), ({"rank_per_expert": 0}, "rank_per_expert")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    mtl_lora.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=f"adapter.{key}: "):
        mtl_lora.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_weights_equal_the_published_formula(tiny_llava):
    d, f, L, T, n, r = 16, 24, 2, 4, 3, 2
    attached = mtl_lora.attach(
        tiny_llava(), mtl_lora.Config(tasks=NAMES, num_experts=n, rank_per_expert=r), Trace()
    )
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    assert attached.num_weights == L * sum(r * i + T * r**2 + n * r * o + T * n for i, o in shapes)
    assert attached.num_active == L * sum(r * i + r**2 + n * r * o + n for i, o in shapes)


def test_weights_of_the_bs_are_fp32_under_bf16():
    linear, trace = make_linear(dtype=torch.bfloat16)
    trace.begin(["?"] * 2, ["general", "document"])
    out = linear(torch.randn(2, 3, 5, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    probs_BTE = trace.routes[0].probs_BTE
    assert probs_BTE.dtype == torch.float32
    torch.testing.assert_close(probs_BTE.sum(-1), torch.ones(2, 3))
