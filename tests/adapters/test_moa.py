"""Mixture-of-LoRAs against loops over sequences, tokens and domains in float64; folders, adding and removing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.decoding import decoded
from tests.adapters.folder_tools import add_plain, draw, peft_folder, write_folder
from workloads.adapters import lora, moa
from workloads.adapters.base import Trace
from workloads.adapters.parts.folders import read_lora
from workloads.adapters.parts.tasks import TaskIds
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

NAMES = ["general", "document", "biomedical", "maps"]


def make_pair(num_domains=3, rank=2, router_grad="straight_through", seed=0, dtype=torch.float64, **fields):
    """A block's front and one of its linears."""
    torch.manual_seed(seed)
    config = moa.Config(
        tasks=NAMES[:num_domains], rank_per_expert=rank, alpha=3.0, router_grad=router_grad, **fields
    )
    trace = Trace()
    front = moa.BlockFront(nn.LayerNorm(5, dtype=dtype), 5, config, trace, layer=0)
    linear = moa.DomainLoRAs(nn.Linear(5, 4, bias=False, dtype=dtype), config, front.decision)
    with torch.no_grad():
        for weight in (*front.router.parameters(), linear.experts_A, linear.experts_B):
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.7)
    return front, linear, trace


def slow_scores(front, x_TI, mask_T):
    valid = [x_TI[t] for t in range(len(mask_T)) if mask_T[t]]
    mean = sum(valid) / len(valid)
    return [(w * mean).sum() + b for w, b in zip(front.router.weight, front.router.bias, strict=True)]


def slow_linear(front, linear, x_BTI, mask_BT, router_grad, scale):
    """Sequence by sequence, token by token, domain by domain."""
    rows = []
    for sample, mask in zip(x_BTI, mask_BT, strict=True):
        exps = [z.exp() for z in slow_scores(front, sample, mask)]
        p = [e / sum(exps) for e in exps]
        best = max(range(len(p)), key=lambda e: float(p[e].detach()))
        gates = {
            "dense": p,
            "hard": [float(e == best) for e in range(len(p))],
            "scaled": [p[e] if e == best else 0.0 for e in range(len(p))],
            "straight_through": [float(e == best) + (p[e] - p[e].detach()) for e in range(len(p))],
        }[router_grad]
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for e, gate in enumerate(gates):
                for r in range(linear.experts_A.shape[1]):
                    inner = (linear.experts_A[e, r] * x).sum()
                    out = out + gate * scale * linear.experts_B[e, r] * inner
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def random_mask(B, T):
    mask_BT = torch.rand(B, T) > 0.4
    mask_BT[:, 0] = True
    return mask_BT


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_block_equals_a_loop_forward_and_backward(router_grad, domains, rank, B, T, seed):
    front, linear, trace = make_pair(domains, rank, router_grad, seed)
    mask_BT = trace.token_mask_BT = random_mask(B, T)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(front(x), front.base_layer(x))
    out, slow = linear(x), slow_linear(front, linear, x, mask_BT, router_grad, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x, "A": linear.experts_A, "B": linear.experts_B}
    if router_grad != "hard":
        named |= {"weight": front.router.weight, "bias": front.router.bias}
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_domain_loss_equals_a_loop_with_its_gradient(domains, B, T, seed):
    fronts = [make_pair(domains, seed=seed + i) for i in range(2)]
    ids, mask_BT = [(seed + b) % domains for b in range(B)], random_mask(B, T)
    xs = [torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True) for _ in fronts]
    theirs = 0.0
    for (front, _, trace), x in zip(fronts, xs, strict=True):
        trace.token_mask_BT = mask_BT
        front(x)
        for b, domain in enumerate(ids):
            exps = [z.exp() for z in slow_scores(front, x[b], mask_BT[b])]
            theirs = theirs - 0.3 * (exps[domain] / sum(exps)).log() / B / 2
    config = moa.Config(tasks=NAMES[:domains], domain_weight=0.3)
    trace.begin(["?"] * B, [NAMES[i] for i in ids])
    ours = moa._losses([front for front, _, _ in fronts], TaskIds(trace, config.tasks), config)["domain_loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    named = [*xs, *(w for front, _, _ in fronts for w in front.router.parameters())]
    for a, b in zip(torch.autograd.grad(ours, named), torch.autograd.grad(theirs, named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_domain_that_nobody_chooses_changes_nothing_and_gets_a_zero_gradient():
    front, linear, trace = make_pair()
    with torch.no_grad():
        front.router.weight.zero_()
        front.router.bias.copy_(torch.tensor([1.0, 0.0, -9.0]))
    trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    front(x)
    before = linear(x)
    before.sum().backward()
    assert trace.routes[0].choice_BT.eq(0).all()
    assert not linear.experts_A.grad[1:].any()
    assert not linear.experts_B.grad[1:].any()
    with torch.no_grad():
        linear.experts_A[1:] = 77.0
    front(x)
    assert torch.equal(linear(x), before)


def test_the_choice_of_the_prefill_is_kept_while_decoding():
    front, linear, trace = make_pair()
    prompt, step = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 1, 5, dtype=torch.float64)
    trace.phase, trace.token_mask_BT = "prefill", torch.ones(2, 4, dtype=torch.bool)
    front(prompt)
    chosen = trace.routes[-1].choice_BT[:, :1]
    # A token that would choose otherwise on its own.
    other = next(e for e in range(3) if (chosen != e).all())
    step += 100 * front.router.weight[other].detach() / front.router.weight[other].detach().norm()
    trace.phase = "decode"
    front(step)
    assert torch.equal(trace.routes[-1].choice_BT, chosen)
    wanted = torch.stack([
        linear.base_layer(s) + 1.5 * s @ linear.experts_A[e].T @ linear.experts_B[e]
        for s, e in zip(step, chosen[:, 0].tolist(), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(linear(step), wanted)
    with pytest.raises(AssertionError, match="the same batch"):
        front(step[:1])


def forced(model, domain):
    """Every router chooses `domain`."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, moa.BlockFront):
                module.router.weight.zero_()
                module.router.bias.zero_()
                module.router.bias[domain] = 5.0


def test_padding_changes_no_answer_and_decoding_equals_the_full_forward(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    moa.attach(model, moa.Config(tasks=NAMES, rank_per_expert=2), trace)
    trace.watch(model)
    draw(model, 3)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with torch.no_grad():
        padded = model(**batch).logits[1, :9]
        alone = model(input_ids=ids[1:, :9], pixel_values=pixels[1:]).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-11)
        forced(model, 2)
        full = model(input_ids=ids[:1], pixel_values=pixels[:1]).logits
        steps = decoded(model, ids[:1, :12], pixels[:1], 7)
        torch.testing.assert_close(steps, full, rtol=1e-9, atol=1e-11)


def test_one_domain_equals_plain_lora(tiny_llava, batch):
    plain, mixed, trace = tiny_llava(), tiny_llava(), Trace()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    moa.attach(mixed, moa.Config(tasks=["only"], rank_per_expert=2, alpha=4.0), trace)
    trace.watch(mixed)
    draw(plain, 5)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in mixed.named_parameters():
            if name.endswith("experts_A"):
                weight[0] = source[name.replace("experts_A", "lora_A.weight")]
            elif name.endswith("experts_B"):
                weight[0] = source[name.replace("experts_B", "lora_B.weight")].T
        torch.testing.assert_close(plain(**batch).logits, mixed(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router_grad", ROUTER_GRADS)
def test_task_loss_reaches_the_routers_exactly_as_declared_and_the_domain_loss_always(
    router_grad, tiny_llava, batch
):
    model, trace = tiny_llava(), Trace()
    config = moa.Config(tasks=NAMES, rank_per_expert=2, router_grad=router_grad)
    attached = moa.attach(model, config, trace)
    trace.watch(model)
    draw(model, 1)
    trace.begin(["?"] * 2, NAMES[:2])
    model(**batch).logits.square().sum().backward(retain_graph=True)
    routers = [w for name, w in model.named_parameters() if name.endswith("router.weight")]
    heard = [w.grad is not None and bool(w.grad.any()) for w in routers]
    assert heard == [attached.capabilities.router_hears_task_loss] * 2
    attached.losses(trace)["domain_loss"].backward()
    assert all(w.grad is not None and w.grad.any() for w in routers)


def test_the_plain_lora_of_a_domain_equals_the_forward_that_chose_it(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    attached = moa.attach(model, moa.Config(tasks=NAMES[:3], rank_per_expert=2), trace)
    trace.watch(model)
    draw(model, 3)
    with torch.no_grad():
        for domain in range(3):
            forced(model, domain)
            ours = add_plain(tiny_llava(), attached.as_lora(NAMES[domain]))(**batch).logits
            torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="None is not allowed"):
        attached.as_lora(None)


def loaded(tiny_llava, tmp_path, **fields):
    """A mixture of two LoRAs that PEFT saved, with different ranks and scales; and PEFT's models."""
    pefts = [
        peft_folder(tiny_llava(), tmp_path / "a", seed=1, r=2, lora_alpha=8),
        peft_folder(tiny_llava(), tmp_path / "b", seed=2, r=3, lora_alpha=5, leaves=("q_proj", "up_proj")),
    ]
    model, trace = tiny_llava(), Trace()
    folders = {"general": str(tmp_path / "a"), "document": str(tmp_path / "b")}
    config = moa.Config(tasks=NAMES[:2], folders=folders, rank_per_expert=3, alpha=6.0, **fields)
    config.check()
    attached = moa.attach(model, config, trace)
    trace.watch(model)
    return model, attached, config, pefts


@pytest.mark.parametrize("train_loras", [True, False])
def test_loaded_loras_act_as_they_did_alone(train_loras, tiny_llava, batch, tmp_path):
    model, attached, _, pefts = loaded(tiny_llava, tmp_path, train_loras=train_loras)
    with torch.no_grad():
        for domain, peft in enumerate(pefts):
            forced(model, domain)
            torch.testing.assert_close(model(**batch).logits, peft(**batch).logits, rtol=1e-9, atol=1e-9)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    stacks = {name for name, _ in model.named_parameters() if ".experts_" in name}
    assert len(stacks) == 2 * 14
    assert bool(trained & stacks) == train_loras
    assert attached.state == (frozenset() if train_loras else stacks)
    assert all("router" in name for name in trained - stacks)


def test_a_restored_mixture_needs_no_folders(tiny_llava, batch, tmp_path):
    model, attached, config, _ = loaded(tiny_llava, tmp_path, train_loras=False)
    draw(model, 4)
    other, trace = tiny_llava(), Trace()
    described = moa.attach(other, config.without_files(), trace)
    trace.watch(other)
    own = dict(other.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad or name in attached.state:
                own[name].copy_(weight)
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert (described.num_weights, described.state) == (attached.num_weights, attached.state)
    assert [path.name for path in config.files()] == ["adapter_config.json", "adapter_model.safetensors"] * 2


def test_folders_that_do_not_fit_are_named(tiny_llava, tmp_path):
    Q = "model.language_model.layers.0.self_attn.q_proj"
    pair = {f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 2)}
    write_folder(tmp_path / "plain", pair)
    bias = torch.ones(16)
    write_folder(tmp_path / "projector", {**pair, "model.multi_modal_projector.linear_1.bias": bias})

    def attach(folder, **fields):
        config = moa.Config(tasks=NAMES[:2], folders={"document": str(tmp_path / folder)}, **fields)
        config.check()
        moa.attach(tiny_llava(), config, Trace())

    attach("plain")
    attach("projector", drop_projectors=True)
    with pytest.raises(
        UserError, match="adapter.folders.document: .*projector: holds a projector of its own"
    ):
        attach("projector")
    with pytest.raises(UserError, match="rank 2 at .*q_proj; adapter.rank_per_expert is 1"):
        attach("plain", rank_per_expert=1)
    with pytest.raises(UserError, match="adapts q_proj; adapter.targets has v_proj"):
        attach("plain", targets=["v_proj"])
    with pytest.raises(UserError, match="adapter.folders.document: .*nowhere: has no readable"):
        attach("nowhere")


def test_removing_a_domain_leaves_the_others_and_adding_one_changes_no_answer_before_training(
    tiny_llava, batch, tmp_path
):
    model, attached, config, pefts = loaded(tiny_llava, tmp_path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".router." in name:
                weight.normal_()
    weights = {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}
    before = {name: w.clone() for name, w in weights.items()}
    peft_c = peft_folder(tiny_llava(), tmp_path / "c", seed=3, r=1, lora_alpha=7)
    third = read_lora(tmp_path / "c", "adapter", tiny_llava())

    def restored(weights, config):
        model, trace = tiny_llava(), Trace()
        moa.attach(model, config, trace)
        trace.watch(model)
        own = {name: w for name, w in model.named_parameters() if w.requires_grad}
        assert set(own) == set(weights)
        with torch.no_grad():
            for name, weight in own.items():
                assert weight.shape == weights[name].shape
                weight.copy_(weights[name])
        return model

    grown, grown_config = moa.add_domain(weights, config, "maps", third)
    assert grown_config.tasks == ["general", "document", "maps"]
    with torch.no_grad():
        bigger = restored(grown, grown_config)
        torch.testing.assert_close(bigger(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-11)
        forced(bigger, 2)
        torch.testing.assert_close(bigger(**batch).logits, peft_c(**batch).logits, rtol=1e-9, atol=1e-9)
        left, left_config = moa.remove_domain(grown, grown_config, "general")
        assert left_config.tasks == ["document", "maps"]
        smaller = restored(left, left_config)
        for domain, peft in enumerate([pefts[1], peft_c]):
            forced(smaller, domain)
            torch.testing.assert_close(smaller(**batch).logits, peft(**batch).logits, rtol=1e-9, atol=1e-9)
    back, back_config = moa.remove_domain(grown, grown_config, "maps")
    assert back_config.tasks == config.tasks
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_domains_that_cannot_be_added_or_removed_are_named(tiny_llava, tmp_path):
    _, _, config, _ = loaded(tiny_llava, tmp_path)
    third = read_lora(tmp_path / "a", "adapter", tiny_llava())
    with pytest.raises(UserError, match="'general' is not allowed"):
        moa.add_domain({}, config, "general", third)
    with pytest.raises(UserError, match="has no place in the mixture"):
        moa.add_domain({}, config, "maps", third)
    with pytest.raises(UserError, match="did you mean 'general'"):
        moa.remove_domain({}, config, "generall")
    with pytest.raises(UserError, match="the last LoRA stays"):
        moa.remove_domain({}, moa.Config(tasks=["general"]), "general")


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"folders": {"c": "x"}}, "folders"), ({"folders": {"a": ""}}, "folders.a"),
     ({"train_loras": False, "folders": {"a": "x"}}, "train_loras"), ({"domain_weight": -1.0}, "domain_weight"),
     ({"domain_weight": 0.0, "router_grad": "hard"}, "domain_weight"), ({"rank_per_expert": 0}, "rank_per_expert")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    moa.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=f"adapter.{key}: "):
        moa.Config(**{"tasks": ["a", "b"], **fields}).check()


@pytest.mark.parametrize("router_grad", ["straight_through", "dense"])
def test_weights_equal_the_formula(router_grad, tiny_llava):
    d, f, L, E, r = 16, 24, 2, 4, 3
    config = moa.Config(tasks=NAMES, rank_per_expert=r, router_grad=router_grad)
    attached = moa.attach(tiny_llava(), config, Trace())
    one, routers = L * r * (8 * d + 3 * (d + f)), L * (d * E + E)
    assert attached.num_weights == E * one + routers
    assert attached.num_active == (E if router_grad == "dense" else 1) * one + routers


def test_router_is_fp32_under_bf16():
    front, linear, trace = make_pair(dtype=torch.bfloat16)
    trace.token_mask_BT = torch.ones(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    assert front(x).dtype == linear(x).dtype == torch.bfloat16
    assert trace.routes[0].probs_BTE.dtype == front.scores_BE.dtype == torch.float32
    wanted = slow_scores(front.double(), x[1].double(), [True] * 3)
    torch.testing.assert_close(front.scores_BE[1].double(), torch.stack(wanted), rtol=1e-5, atol=1e-6)
