"""SMoRA against a loop over tokens and ranks in float64; the load bias against a loop over samples and workers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from workloads.adapters import lora, smora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

ALPHA = 3.0


def make_linear(ranks=4, top_k=2, router_grad="scaled", seed=0, dtype=torch.float64, width=6):
    torch.manual_seed(seed)
    config = smora.Config(rank_total=ranks, top_k=top_k, alpha=ALPHA, router_grad=router_grad, bias_step=0.01)
    trace = Trace()
    spot = Spot(path="q_proj", layer=0, leads=True)
    linear = smora.RankExperts(nn.Linear(width, 4, bias=False).to(dtype), config, trace, spot)
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.7)
    linear.bias_steps.copy_(torch.randint(-20, 20, (ranks,)))
    return linear, trace


def slow_scores(router, bias, token):
    return [1 / (1 + (-(row @ token)).exp()) + b for row, b in zip(router, bias, strict=True)]


def slow_chosen(scores, top_k):
    return sorted(range(len(scores)), key=lambda i: -float(scores[i].detach()))[:top_k]


def slow_linear(linear, x_BTI, router_grad, top_k, bias):
    """W x + (alpha / k) * sum_i g_i B_i (A_i . x), token by token, rank by rank."""
    samples = []
    for sample in x_BTI:
        tokens = []
        for token in sample:
            a = slow_scores(linear.router, bias, token)
            chosen = slow_chosen(a, top_k)
            out = linear.base_layer.weight @ token
            for i in range(len(a)):
                whole = top_k * a[i] / sum(a)
                if router_grad == "dense":
                    gate = whole
                elif router_grad == "straight_through":
                    gate = float(i in chosen) + (whole - whole.detach())
                elif i not in chosen:
                    continue
                else:
                    gate = 1.0 if router_grad == "hard" else top_k * a[i] / sum(a[j] for j in chosen)
                out = out + ALPHA / top_k * gate * (linear.ranks_A[i] * token).sum() * linear.ranks_B[i]
            tokens.append(out)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, ranks, top_k, B, T, seed):
    top_k = min(top_k, ranks)
    linear, trace = make_linear(ranks, top_k, router_grad, seed)
    trace.token_mask_BT = torch.ones(B, T, dtype=torch.bool)
    bias = [0.01 * int(steps) for steps in linear.bias_steps]
    x = torch.randn(B, T, 6, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, router_grad, top_k, bias)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    trained = {key: weight for key, weight in linear.named_parameters() if weight.requires_grad}
    assert ("router" in trained) == (router_grad != "hard")
    ours = torch.autograd.grad((out * probe).sum(), [x, *trained.values()])
    theirs = torch.autograd.grad((slow * probe).sum(), [x, *trained.values()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def attached(tiny_llava, **settings):
    model, trace = tiny_llava(), Trace()
    trace.watch(model)
    torch.manual_seed(1)
    config = smora.Config(rank_total=5, top_k=2, **settings)
    described = smora.attach(model, config, trace)
    for key, weight in model.named_parameters():
        if "ranks_B" in key:
            nn.init.normal_(weight)
    return model, trace, described


def inputs_of(model):
    """Paths of the adapted linears, and a list that fills with (input, path) at every forward pass."""
    seen = []
    for path, module in model.named_modules():
        if isinstance(module, smora.RankExperts):
            module.register_forward_hook(
                lambda module, args, out, path=path: seen.append((path, args[0].detach().clone()))
            )
    return seen


def slow_bias(model, seen, masks, bias_before):
    """Each rank's bias in steps: +1 below the mean number of valid tokens, -1 above it."""
    after = {}
    for path, before in bias_before.items():
        module = model.get_submodule(path)
        counts = [0] * len(before)
        inputs = [x for name, x in seen if name == path]
        for x_BTI, mask in zip(inputs, masks, strict=True):
            for b in range(x_BTI.shape[0]):
                for t in range(x_BTI.shape[1]):
                    if mask[b, t]:
                        bias = [1e-5 * step for step in before]
                        for i in slow_chosen(slow_scores(module.router, bias, x_BTI[b, t]), 2):
                            counts[i] += 1
        mean = sum(counts) / len(counts)
        assert sum(counts) == 2 * sum(int(mask.sum()) for mask in masks)
        after[path] = [step + (mean > c) - (mean < c) for step, c in zip(before, counts, strict=True)]
    return after


def biases(model):
    return {
        path: module.bias_steps.tolist()
        for path, module in model.named_modules()
        if isinstance(module, smora.RankExperts)
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bias_moves_towards_balance_once_a_step_whether_or_not_blocks_are_recomputed(
    checkpointing, tiny_llava, batch
):
    model, trace, described = attached(tiny_llava)
    model.train()
    seen = inputs_of(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    before = biases(model)
    first_seen = []
    for micro in (slice(0, 1), slice(1, 2)):
        one = {key: value[micro] for key, value in batch.items()}
        loss = model(**one, use_cache=False).logits.square().mean()
        assert described.losses(trace) == {}
        # What recomputation shows to the hooks in backward is not counted a second time.
        first_seen += seen
        num_seen = len(seen)
        loss.backward()
        assert (len(seen) > num_seen) == checkpointing
        seen.clear()
        trace.clear()
    assert biases(model) == before
    described.after_step(lambda tensor: tensor)
    masks = [batch["attention_mask"][:1].bool(), batch["attention_mask"][1:].bool()]
    expected = slow_bias(model, first_seen, masks, before)
    assert biases(model) == expected
    assert any(step != 0 for steps in expected.values() for step in steps)
    # The counts are used up: a step without any token moves nothing.
    described.after_step(lambda tensor: tensor)
    assert biases(model) == expected


def test_two_workers_and_one_move_the_bias_alike(tiny_llava, batch):
    whole, trace, described = attached(tiny_llava)
    whole.train()
    whole(**batch, use_cache=False)
    described.losses(trace)
    described.after_step(lambda tensor: tensor)
    halves = [attached(tiny_llava) for _ in range(2)]
    counts = []
    for i, (model, half_trace, half) in enumerate(halves):
        model.train()
        model(**{key: value[i : i + 1] for key, value in batch.items()}, use_cache=False)
        half.losses(half_trace)
        linears = [m for m in model.modules() if isinstance(m, smora.RankExperts)]
        counts.append(torch.stack([m.pending.clone() for m in linears]))
    for i, (model, _, half) in enumerate(halves):
        half.after_step(lambda tensor, other=counts[1 - i]: tensor + other)
        assert biases(model) == biases(whole)


def test_neither_evaluation_nor_decoding_moves_the_bias(tiny_llava, batch):
    model, trace, described = attached(tiny_llava)
    model.eval()
    before = biases(model)
    model(**batch)
    described.losses(trace)
    described.after_step(lambda tensor: tensor)
    assert biases(model) == before


def test_bias_is_saved_state_exact_under_bf16(tiny_llava):
    model, _, described = attached(tiny_llava)
    named = {key for key, _ in model.named_buffers() if key.endswith("bias_steps")}
    assert len(named) == 2 * 7
    assert described.state == named
    assert described.capabilities.stateful
    assert named <= set(model.state_dict())
    assert not any(key.endswith(("visits", "pending")) for key in model.state_dict())
    steps = dict(model.named_buffers())[sorted(named)[0]]
    # A bias of 3001 steps of 1e-5 has no bf16 value.
    steps.fill_(3001)
    model.bfloat16()
    assert dict(model.named_buffers())[sorted(named)[0]].tolist() == [3001] * 5


@pytest.mark.parametrize("router_grad", ["hard", "scaled"])
def test_trained_weights_and_state_restore_the_model(router_grad, tiny_llava, batch):
    model, _, described = attached(tiny_llava, router_grad=router_grad, bias_step=0.1)
    other, _, _ = attached(tiny_llava, router_grad=router_grad, bias_step=0.1)
    target = other.state_dict()
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("bias_steps"):
                tensor.copy_(torch.tensor([3, -1, 0, 2, -5]))
            if key.endswith(".router"):
                target[key].add_(1.0)
            if key in trained or key in described.state:
                target[key].copy_(tensor)
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_zero_bias_step_leaves_the_scores_alone():
    linear, trace = make_linear()
    trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    still = smora.RankExperts(
        linear.base_layer,
        smora.Config(rank_total=4, top_k=2, alpha=ALPHA, bias_step=0.0),
        trace,
        Spot(path="q_proj", layer=0, leads=False),
    )
    still.load_state_dict(linear.state_dict())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    slow = slow_linear(linear, x, "scaled", 2, [0.0] * 4)
    torch.testing.assert_close(still(x), slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_router_exactly_as_declared(router_grad, tiny_llava, batch):
    model, _, described = attached(tiny_llava, router_grad=router_grad)
    model(**batch).logits.square().sum().backward()
    routers = {key: weight for key, weight in model.named_parameters() if key.endswith(".router")}
    heard = [
        weight.grad is not None and float(weight.grad.abs().max()) > 1e-12 for weight in routers.values()
    ]
    declared = described.capabilities.router_hears_task_loss
    assert declared == (router_grad != "hard")
    assert heard == [declared] * (2 * 7)
    saved_routers = {key for key in described.state if key.endswith(".router")}
    assert saved_routers == (set() if declared else set(routers))


def test_a_rank_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient():
    linear, trace = make_linear(ranks=3, top_k=2)
    trace.token_mask_BT = torch.ones(2, 4, dtype=torch.bool)
    linear.bias_steps.zero_()
    with torch.no_grad():
        linear.router[2] = -9.0
    x = torch.randn(2, 4, 6, dtype=torch.float64).abs()
    before = linear(x)
    before.sum().backward()
    assert linear.visits[2] == 0
    for weight in (linear.ranks_A, linear.ranks_B, linear.router):
        assert weight.grad[:2].abs().max() > 0
        assert weight.grad[2].abs().max() == 0
    with torch.no_grad():
        linear.ranks_A[2] = 77.0
    assert torch.equal(linear(x), before)


def test_all_ranks_chosen_hard_equals_plain_lora(tiny_llava, batch):
    plain, ranked = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=3, alpha=5.0), Trace())
    trace = Trace()
    trace.watch(ranked)
    config = smora.Config(rank_total=3, top_k=3, alpha=5.0, router_grad="hard")
    smora.attach(ranked, config, trace)
    target = dict(ranked.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3
            path, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            target[f"{path}.ranks_{factor}"].data = (weight.data if factor == "A" else weight.data.T).clone()
    with torch.no_grad():
        ours, theirs = ranked(**batch).logits, plain(**batch).logits
        assert (theirs - tiny_llava()(**batch).logits).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_padding_is_neither_counted_nor_heard():
    linear, trace = make_linear()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    trace.token_mask_BT = mask
    padded = linear(x)
    assert int(linear.visits.sum()) == 2 * 8
    trace.token_mask_BT = mask[1:, :3]
    torch.testing.assert_close(padded[1:, :3], linear(x[1:, :3]), rtol=1e-12, atol=1e-12)
    assert int(linear.visits.sum()) == 2 * 3


def test_router_computes_in_fp32_under_bf16():
    linear, trace = make_linear(ranks=8, top_k=3, dtype=torch.bfloat16, width=32)
    x = torch.randn(2, 3, 32).bfloat16()
    trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    assert linear(x).dtype == torch.bfloat16
    shares = trace.routes[0].probs_BTE
    assert shares.dtype == torch.float32
    bias = [0.01 * int(steps) for steps in linear.bias_steps]
    for b in range(2):
        for t in range(3):
            a = slow_scores(linear.router.double(), bias, x[b, t].double())
            exact = torch.stack([value / sum(a) for value in a])
            torch.testing.assert_close(shares[b, t].double(), exact, rtol=1e-4, atol=1e-6)
            assert int(trace.routes[0].choice_BT[b, t]) == slow_chosen(a, 1)[0]


def test_each_block_reports_one_router(tiny_llava, batch):
    model, trace, _ = attached(tiny_llava)
    model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    for route in trace.routes:
        torch.testing.assert_close(route.probs_BTE.sum(-1), torch.ones(2, 12, dtype=torch.float64))


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
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    described = smora.attach(model, smora.Config(rank_total=64, top_k=8), Trace())
    outs_and_ins = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert described.num_weights == 32 * sum(64 * (o + i) + 64 * i for o, i in outs_and_ins)
    assert described.num_active == 32 * sum(8 * (o + i) + 64 * i for o, i in outs_and_ins)


def test_more_chosen_ranks_than_there_are_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"adapter\.top_k: 5 is not allowed; from 1 to .*\(4\)"):
        smora.Config(rank_total=4, top_k=5).check()


def test_plain_form_is_refused_with_the_reason(tiny_llava):
    _, _, described = attached(tiny_llava)
    assert isinstance(described.as_lora, str)
    assert "every token" in described.as_lora
