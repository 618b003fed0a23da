"""MixLoRA against a loop over samples, factors and tokens in float64, with and without a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.adapters.decoding import decoded
from workloads.adapters import lora, mix_lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

ALPHA, IFS_WEIGHT = 3.0, 0.6
SELECTIONS = ("ifs", "ifs_cfs")


def make_linear(
    size=4, top_k=2, selection="ifs_cfs", router_grad="hard", seed=0, dtype=torch.float64, width=6
):
    torch.manual_seed(seed)
    config = mix_lora.Config(
        rank_total=size,
        top_k=top_k,
        alpha=ALPHA,
        selection=selection,
        ifs_weight=IFS_WEIGHT,
        router_grad=router_grad,
    )
    trace = Trace()
    base = nn.Linear(width, 5, bias=False).to(dtype)
    linear = mix_lora.FactorPools(base, config, trace, Spot(path="q_proj", layer=0, leads=True))
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.7)
    return linear, trace


def slow_softmax(scores):
    exps = [score.exp() for score in scores]
    return [value / sum(exps) for value in exps]


def best_first(scores):
    return sorted(range(len(scores)), key=lambda e: -float(scores[e].detach()))


def slow_choice(linear, tokens, top_k):
    """Orders and probabilities of one sample's A and B factors from its valid tokens."""
    mean = sum(tokens) / len(tokens)
    scores_A = [row @ mean for row in linear.router_A]
    scores_B = [row @ mean for row in linear.router_B]
    order_A = best_first(scores_A)
    if linear.router_AB is None:
        return order_A, best_first(scores_B), slow_softmax(scores_A), slow_softmax(scores_B)
    joined = torch.cat([linear.factors_A[i] for i in order_A[:top_k]])
    heard = slow_softmax([row @ joined for row in linear.router_AB])
    mixed = [h + IFS_WEIGHT * p for h, p in zip(heard, slow_softmax(scores_B), strict=True)]
    return order_A, best_first(mixed), slow_softmax(scores_A), [m / (1 + IFS_WEIGHT) for m in mixed]


def slow_linear(linear, x_BTI, mask_BT, router_grad, top_k):
    """(W + s sum_m gate_m b_m a_m^T) x with the sample's own matrix written out."""
    samples = []
    for sample, mask in zip(x_BTI, mask_BT, strict=True):
        valid = [token for token, ok in zip(sample, mask, strict=True) if ok]
        order_A, order_B, p_A, p_B = slow_choice(linear, valid, top_k)
        matrix = linear.base_layer.weight
        for m, (i, j) in enumerate(zip(order_A, order_B, strict=True)):
            pair = p_A[i] * p_B[j]
            if router_grad == "dense":
                gate = pair
            elif router_grad == "straight_through":
                gate = float(m < top_k) + (pair - pair.detach())
            elif m >= top_k:
                continue
            else:
                gate = pair if router_grad == "scaled" else 1.0
            matrix = matrix + ALPHA / top_k * gate * torch.outer(linear.factors_B[j], linear.factors_A[i])
        samples.append(torch.stack([matrix @ token for token in sample]))
    return torch.stack(samples)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.sampled_from(SELECTIONS), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, selection, size, top_k, B, T, seed):
    top_k = min(top_k, size)
    linear, trace = make_linear(size, top_k, selection, router_grad, seed)
    trace.token_mask_BT = torch.rand(B, T) > 0.4
    trace.token_mask_BT[:, 0] = True
    x = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, trace.token_mask_BT, router_grad, top_k)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    trained = {key: weight for key, weight in linear.named_parameters() if weight.requires_grad}
    assert any("router" in key for key in trained) == (router_grad != "hard")
    ours = torch.autograd.grad((out * probe).sum(), [x, *trained.values()])
    theirs = torch.autograd.grad((slow * probe).sum(), [x, *trained.values()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_decoding_keeps_the_selection_of_prefill(router_grad, selection):
    linear, trace = make_linear(selection=selection, router_grad=router_grad, seed=3)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :2] = False  # padded on the left, as prompts are
    prompt = valid.clone()
    prompt[:, 4:] = False
    trace.phase, trace.token_mask_BT = "prefill", valid[:, :4]
    steps = [linear(x[:, :4])]
    for t in range(4, 7):
        trace.phase, trace.token_mask_BT = "decode", valid[:, t : t + 1]
        steps.append(linear(x[:, t : t + 1]))
    slow = slow_linear(linear, x, prompt, router_grad, 2)
    torch.testing.assert_close(torch.cat(steps, dim=1), slow, rtol=1e-10, atol=1e-12)
    # The later tokens alone would have chosen other factors.
    trace.phase, trace.token_mask_BT = "full", valid[:, 4:]
    assert not torch.allclose(linear(x[:, 4:]), slow[:, 4:])
    assert linear.kept is None


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_sample_alone_padded_left_or_right_gives_the_same_outputs(selection):
    linear, trace = make_linear(selection=selection, router_grad="scaled")
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    trace.token_mask_BT = torch.ones(1, 4, dtype=torch.bool)
    alone = linear(x[:1, 1:5])
    right, left = torch.ones(2, 2, 6, dtype=torch.bool)
    right[0, 4:], left[0, :2] = False, False
    for mask, place in ((right, slice(0, 4)), (left, slice(2, 6))):
        padded = torch.randn(2, 6, 6, dtype=torch.float64)
        padded[0, place] = x[0, 1:5]
        trace.token_mask_BT = mask
        torch.testing.assert_close(linear(padded)[:1, place], alone, rtol=1e-12, atol=1e-12)


def attached(tiny_llava, **settings):
    model, trace = tiny_llava(), Trace()
    trace.watch(model)
    torch.manual_seed(1)
    described = mix_lora.attach(model, mix_lora.Config(rank_total=4, top_k=2, **settings), trace)
    for key, weight in model.named_parameters():
        if "factors_B" in key:
            nn.init.normal_(weight)
    return model, trace, described


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_routers_exactly_as_declared(router_grad, selection, tiny_llava, batch):
    model, _, described = attached(tiny_llava, router_grad=router_grad, selection=selection)
    model(**batch).logits.square().sum().backward()
    routers = {key: w for key, w in model.named_parameters() if ".router_" in key}
    assert len(routers) == 2 * 7 * (3 if selection == "ifs_cfs" else 2)
    heard = [w.grad is not None and float(w.grad.abs().max()) > 1e-14 for w in routers.values()]
    declared = described.capabilities.router_hears_task_loss
    assert declared == (router_grad != "hard")
    assert heard == [declared] * len(routers)
    assert described.state == (frozenset() if declared else frozenset(routers))


def test_teacher_forcing_with_known_prompts_equals_prefill_and_decoding(tiny_llava, batch):
    model, trace, _ = attached(tiny_llava)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    trace.prompt_lengths = (7,)
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=pixels).logits
        steps = decoded(model, ids[:, :12], pixels, 7)
    torch.testing.assert_close(steps, full, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router_grad", ["hard", "scaled"])
def test_trained_weights_and_state_restore_the_model(router_grad, tiny_llava, batch):
    model, _, described = attached(tiny_llava, router_grad=router_grad)
    other, _, _ = attached(tiny_llava, router_grad=router_grad)
    target = dict(other.named_parameters())
    with torch.no_grad():
        for key, weight in target.items():
            if weight.requires_grad or ".router_" in key:
                weight.add_(1.0)
        for key, weight in model.named_parameters():
            if weight.requires_grad or key in described.state:
                target[key].copy_(weight)
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_chosen_a_factors_sway_the_choice_of_b_factors_only_with_cfs():
    flips = {}
    for selection in SELECTIONS:
        linear, trace = make_linear(selection=selection, seed=1)
        trace.token_mask_BT = torch.ones(8, 3, dtype=torch.bool)
        mean_BI = linear._mean(torch.randn(8, 3, 6, dtype=torch.float64))
        before = linear._select(mean_BI)
        with torch.no_grad():
            linear.factors_A.mul_(-3)
        after = linear._select(mean_BI)
        assert torch.equal(before.index_A_BM, after.index_A_BM)
        flips[selection] = not torch.equal(before.index_B_BM, after.index_B_BM)
    assert flips == {"ifs": False, "ifs_cfs": True}


def test_a_factor_that_no_sample_chooses_changes_nothing_and_gets_a_zero_gradient():
    linear, trace = make_linear(size=3, selection="ifs")
    trace.token_mask_BT = torch.ones(2, 4, dtype=torch.bool)
    x = torch.randn(2, 4, 6, dtype=torch.float64).abs()
    with torch.no_grad():
        linear.router_A[2] = -9.0
        linear.router_B[0] = -9.0
    before = linear(x)
    before.sum().backward()
    for weight, lost in ((linear.factors_A, 2), (linear.factors_B, 0)):
        assert weight.grad[lost].abs().max() == 0
        assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        linear.factors_A[2] = 77.0
        linear.factors_B[0] = 77.0
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_factor_equals_plain_lora_of_rank_one(selection, tiny_llava, batch):
    plain, mixed = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=1, alpha=5.0), Trace())
    trace = Trace()
    trace.watch(mixed)
    mix_lora.attach(mixed, mix_lora.Config(rank_total=1, top_k=1, alpha=5.0, selection=selection), trace)
    target = dict(mixed.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3
            path, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            target[f"{path}.factors_{factor}"].data = (
                weight.data if factor == "A" else weight.data.T
            ).clone()
    with torch.no_grad():
        ours, theirs = mixed(**batch).logits, plain(**batch).logits
        assert (theirs - tiny_llava()(**batch).logits).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_routers_compute_in_fp32_under_bf16():
    linear, trace = make_linear(size=6, router_grad="scaled", dtype=torch.bfloat16, width=32)
    x = torch.randn(3, 4, 32).bfloat16()
    trace.token_mask_BT = torch.ones(3, 4, dtype=torch.bool)
    assert linear(x).dtype == torch.bfloat16
    selection = linear._selection(x)
    assert selection.gates_BM.dtype == selection.probs_A_BE.dtype == torch.float32
    linear.double()
    for b in range(3):
        order_A, order_B, p_A, p_B = slow_choice(linear, list(x[b].double()), 2)
        assert selection.index_A_BM[b].tolist() == order_A[:2]
        assert selection.index_B_BM[b].tolist() == order_B[:2]
        exact = torch.stack([p_A[i] * p_B[j] for i, j in zip(order_A[:2], order_B[:2], strict=True)])
        torch.testing.assert_close(selection.gates_BM[b].double(), exact, rtol=1e-4, atol=1e-6)


def test_each_block_reports_one_router_the_same_at_every_token(tiny_llava, batch):
    model, trace, _ = attached(tiny_llava)
    model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    for route in trace.routes:
        assert route.probs_BTE.shape == (2, 12, 4)
        assert torch.equal(route.probs_BTE.argmax(-1), route.choice_BT)
        assert torch.equal(route.choice_BT, route.choice_BT[:, :1].expand(2, 12))


def test_no_weight_matrix_of_a_sample_is_formed():
    width = 64
    linear, trace = make_linear(size=4, top_k=2, router_grad="straight_through", width=width)
    x = torch.randn(3, 2, width, dtype=torch.float64, requires_grad=True)
    trace.token_mask_BT = torch.ones(3, 2, dtype=torch.bool)
    largest = [0]

    def note(tensor):
        largest[0] = max(largest[0], tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x)
    # The largest tensor kept is the chosen factors (B, E, I), not (B, O, I).
    assert 0 < largest[0] <= 3 * 4 * width < 3 * 5 * width


def test_weights_at_llava_7b_size_equal_the_published_formula():
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
    outs_and_ins = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    E, r = 16, 4
    factors = 32 * sum(E * (o + i) for o, i in outs_and_ins)
    routers = {
        "ifs": 32 * sum(2 * E * i for _, i in outs_and_ins),
        "ifs_cfs": 32 * sum((2 * E + E * r) * i for _, i in outs_and_ins),
    }
    for selection in SELECTIONS:
        for router_grad in ("hard", "scaled", "dense"):
            with torch.device("meta"):
                model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
            config = mix_lora.Config(rank_total=E, top_k=r, selection=selection, router_grad=router_grad)
            described = mix_lora.attach(model, config, Trace())
            # Under `hard` the routers are the same size but are not trained.
            trained_routers = 0 if router_grad == "hard" else routers[selection]
            every = sum(
                w.numel() for key, w in model.named_parameters() if ".factors_" in key or ".router_" in key
            )
            assert every == factors + routers[selection]
            assert described.num_weights == factors + trained_routers
            visited = factors if router_grad == "dense" else factors * r // E
            assert described.num_active == visited + trained_routers


def test_values_out_of_range_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"adapter\.top_k: 5 is not allowed; from 1 to .*\(4\)"):
        mix_lora.Config(rank_total=4, top_k=5).check()
    with pytest.raises(UserError, match=r"adapter\.ifs_weight: -1"):
        mix_lora.Config(ifs_weight=-1).check()


def test_plain_form_is_refused_with_the_reason(tiny_llava):
    _, _, described = attached(tiny_llava)
    assert isinstance(described.as_lora, str)
    assert "every sample" in described.as_lora
