"""MoRE against loops over samples, tokens and ranks in float64; nested ranks, selector, contrastive loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.decoding import decoded
from tests.adapters.folder_tools import add_plain, draw
from workloads.adapters import lora, more
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.adapters.parts.tasks import TaskIds
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

NAMES = ["general", "document", "biomedical", "maps"]
SPOT = Spot(path="q_proj", layer=0, leads=True)


def make_linear(num_tasks=3, rank=3, router_grad="straight_through", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = more.Config(tasks=NAMES[:num_tasks], rank_total=rank, alpha=3.0, router_grad=router_grad)
    trace = Trace()
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    linear = more.NestedLoRA(base, config, trace, TaskIds(trace, config.tasks), SPOT)
    with torch.no_grad():
        for weight in (linear.lora_A, linear.lora_B, linear.selector.weight, linear.selector.embedding):
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.7)
    return linear, trace


def slow_probs(linear, t):
    scores = [(row * linear.selector.embedding[t]).sum() for row in linear.selector.weight]
    exps = [z.exp() for z in scores]
    return [e / sum(exps) for e in exps]


def slow_linear(linear, x_BTI, ids, router_grad, scale):
    """Sample by sample and token by token: the mixture over ranks j of the LoRA cut to its first j parts."""
    rows = []
    for sample, t in zip(x_BTI, ids, strict=True):
        p = slow_probs(linear, t)
        best = max(range(len(p)), key=lambda j: float(p[j].detach()))
        gates = {
            "dense": p,
            "hard": [float(j == best) for j in range(len(p))],
            "scaled": [p[j] if j == best else 0.0 for j in range(len(p))],
            "straight_through": [float(j == best) + (p[j] - p[j].detach()) for j in range(len(p))],
        }[router_grad]
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for j, gate in enumerate(gates):
                for i in range(j + 1):
                    out = out + gate * scale * linear.lora_B[:, i] * (linear.lora_A[i] * x).sum()
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, num_tasks, rank, B, T, seed):
    linear, trace = make_linear(num_tasks, rank, router_grad, seed)
    ids = [(seed + 2 * b) % num_tasks for b in range(B)]
    trace.begin(["?"] * B, [NAMES[i] for i in ids])
    trace.token_mask_BT = torch.ones(B, T, dtype=torch.bool)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, ids, router_grad, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x, "A": linear.lora_A, "B": linear.lora_B}
    if router_grad != "hard":
        named |= {"weight": linear.selector.weight, "embedding": linear.selector.embedding}
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


def slow_contrast(linears, xs, mask_BT, ids, temperature):
    """Mean over linears and samples of -log softmax of the cosines over the tasks, at the sample's own task."""
    total = 0.0
    for linear, x_BTI in zip(linears, xs, strict=True):
        for b, t in enumerate(ids):
            valid = [x_BTI[b, i] for i in range(len(mask_BT[b])) if mask_BT[b, i]]
            mean = sum(valid) / len(valid)
            cosines = [
                (mean * e).sum() / (mean.square().sum().sqrt() * e.square().sum().sqrt())
                for e in linear.selector.embedding
            ]
            exps = [(c / temperature).exp() for c in cosines]
            total = total - (exps[t] / sum(exps)).log() / len(ids) / len(linears)
    return total


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_contrastive_loss_equals_a_loop_with_its_gradient(num_tasks, B, T, seed):
    pairs = [make_linear(num_tasks, seed=seed + i) for i in range(2)]
    linears = [linear for linear, _ in pairs]
    mask_BT = torch.rand(B, T) > 0.4
    mask_BT[:, 0] = True
    ids = [(seed + b) % num_tasks for b in range(B)]
    xs = [torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True) for _ in pairs]
    for (linear, trace), x in zip(pairs, xs, strict=True):
        trace.begin(["?"] * B, [NAMES[i] for i in ids])
        trace.token_mask_BT = mask_BT
        linear(x)
    config = more.Config(tasks=NAMES[:num_tasks], contrast_weight=0.3, contrast_temperature=0.2)
    ours = more._losses(linears, linears[0].task_ids, config)["contrast_loss"]
    theirs = 0.3 * slow_contrast(linears, xs, mask_BT, ids, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    named = [*xs, *(linear.selector.embedding for linear in linears)]
    for a, b in zip(torch.autograd.grad(ours, named), torch.autograd.grad(theirs, named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_parts_beyond_the_chosen_rank_change_nothing_and_get_a_zero_gradient(chosen):
    linear, trace = make_linear(num_tasks=1)
    with torch.no_grad():
        linear.selector.embedding.fill_(1.0)
        linear.selector.weight.zero_()
        linear.selector.weight[chosen - 1] = 1.0
    trace.begin(["?"], NAMES[:1])
    trace.token_mask_BT = torch.ones(1, 2, dtype=torch.bool)
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    before = linear(x)
    before.square().sum().backward()
    assert linear.lora_A.grad[:chosen].abs().min() > 0
    assert not linear.lora_A.grad[chosen:].any()
    assert not linear.lora_B.grad[:, chosen:].any()
    with torch.no_grad():
        linear.lora_A[chosen:] = 77.0
    assert torch.equal(linear(x), before)
    assert trace.routes[0].choice_BT.eq(chosen - 1).all()


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_selector_exactly_as_declared(router_grad, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    config = more.Config(tasks=NAMES, rank_total=3, router_grad=router_grad)
    attached = more.attach(model, config, trace)
    trace.watch(model)
    draw(model, 1)
    trace.begin(["?"] * 2, NAMES[:2])
    model(**batch).logits.square().sum().backward(retain_graph=True)
    weights = {name: w for name, w in model.named_parameters() if name.endswith("selector.weight")}
    heard = [w.grad is not None and bool(w.grad.any()) for w in weights.values()]
    assert heard == [attached.capabilities.router_hears_task_loss] * 14
    assert attached.state == (set(weights) if router_grad == "hard" else set())
    attached.losses(trace)["contrast_loss"].backward()
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)


def test_one_rank_equals_plain_lora(tiny_llava, batch):
    plain, nested, trace = tiny_llava(), tiny_llava(), Trace()
    lora.attach(plain, lora.Config(rank=1, alpha=4.0), Trace())
    more.attach(nested, more.Config(tasks=NAMES, rank_total=1, alpha=4.0), trace)
    trace.watch(nested)
    trace.begin(["?"] * 2, ["maps", "general"])
    draw(plain, 5)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in nested.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                weight.copy_(source[f"{name}.weight"])
        torch.testing.assert_close(plain(**batch).logits, nested(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_the_plain_lora_of_a_task_equals_the_forward(router_grad, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    attached = more.attach(model, more.Config(tasks=NAMES, rank_total=3, router_grad=router_grad), trace)
    trace.watch(model)
    draw(model, 3)
    with torch.no_grad():
        for task in NAMES[:2]:
            trace.begin(["?"] * 2, [task] * 2)
            ours = add_plain(tiny_llava(), attached.as_lora(task))(**batch).logits
            torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-9, atol=1e-9)


def test_padding_changes_neither_answer_nor_contrastive_loss_and_decoding_equals_the_full_forward(
    tiny_llava, batch
):
    model, trace = tiny_llava(), Trace()
    attached = more.attach(model, more.Config(tasks=NAMES, rank_total=3), trace)
    trace.watch(model)
    draw(model, 3)
    ids, pixels, mask = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    trace.begin(["?"], ["document"])
    padded = model(input_ids=ids[1:], attention_mask=mask[1:], pixel_values=pixels[1:]).logits[0, :9]
    with_padding = attached.losses(trace)["contrast_loss"]
    alone = model(input_ids=ids[1:, :9], pixel_values=pixels[1:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(with_padding, attached.losses(trace)["contrast_loss"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(decoded(model, ids[1:, :9], pixels[1:], 5)[0], alone, rtol=1e-9, atol=1e-11)


def test_without_contrast_there_is_no_term():
    config = more.Config(tasks=NAMES, contrast_weight=0.0)
    assert more._losses([], TaskIds(Trace(), NAMES), config) == {}


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"rank_total": 0}, "rank_total"), ({"contrast_weight": -1.0}, "contrast_weight"),
     ({"contrast_temperature": 0.0}, "contrast_temperature")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    more.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=f"adapter.{key}: "):
        more.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_weights_equal_the_published_formula(tiny_llava):
    d, f, L, T, r = 16, 24, 2, 4, 3
    attached = more.attach(tiny_llava(), more.Config(tasks=NAMES, rank_total=r), Trace())
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    assert attached.num_weights == L * sum(r * (i + o) + T * i + i * r for i, o in shapes)
    assert attached.num_active == L * sum(r * (i + o) + i + i * r for i, o in shapes)


def test_selector_is_fp32_under_bf16():
    linear, trace = make_linear(dtype=torch.bfloat16)
    trace.begin(["?"] * 2, ["general", "document"])
    trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    out = linear(torch.randn(2, 3, 5, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert trace.routes[0].probs_BTE.dtype == linear.cosines_BN.dtype == torch.float32
    wanted = slow_probs(linear.float(), 1)
    torch.testing.assert_close(trace.routes[0].probs_BTE[1, 0], torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert linear.cosines_BN.abs().max() <= 1 + 1e-6
