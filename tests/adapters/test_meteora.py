"""MeteoRA against loops over tokens and LoRAs in float64; frozen LoRAs from folders, gates, gate loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.decoding import decoded
from tests.adapters.folder_tools import draw, peft_folder, write_folder
from workloads import adapters
from workloads.adapters import lora, meteora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.adapters.parts.tasks import TaskIds
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

NAMES = ["general", "document", "biomedical", "maps"]
SPOT = Spot(path="q_proj", layer=0, leads=True)


def config_of(num_loras=3, top_k=2, **fields):
    folders = dict.fromkeys(NAMES[:num_loras], "unread")
    return meteora.Config(tasks=NAMES[:num_loras], folders=folders, top_k=top_k, **fields)


def make_linear(num_loras=3, top_k=2, rank=2, router_grad="scaled", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = config_of(num_loras, top_k, rank_per_expert=rank, temperature=0.7, router_grad=router_grad)
    trace = Trace()
    linear = meteora.GatedLoRAs(nn.Linear(5, 4, bias=False, dtype=dtype), config, trace, SPOT)
    with torch.no_grad():
        for weight in (linear.gate.weight, linear.experts_A, linear.experts_B):
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.7)
    return linear, trace


def slow_weights(scores, top_k, temperature, router_grad):
    """The weight of each LoRA for one token, with its gradient path explicit."""
    exps = [(z / temperature).exp() for z in scores]
    everywhere = [e / sum(exps) for e in exps]
    best = sorted(range(len(exps)), key=lambda i: -float(scores[i].detach()))[:top_k]
    chosen = [exps[i] / sum(exps[j] for j in best) if i in best else 0 * exps[i] for i in range(len(exps))]
    if router_grad == "dense":
        return everywhere
    if router_grad == "scaled":
        return chosen
    if router_grad == "hard":
        return [w.detach() for w in chosen]
    return [w.detach() + (p - p.detach()) for w, p in zip(chosen, everywhere, strict=True)]


def slow_linear(linear, x_BTI, top_k, router_grad):
    rows = []
    for sample in x_BTI:
        tokens = []
        for x in sample:
            scores = [(g * x).sum() for g in linear.gate.weight]
            out = linear.base_layer.weight @ x
            for e, weight in enumerate(slow_weights(scores, top_k, 0.7, router_grad)):
                for r in range(linear.experts_A.shape[1]):
                    out = out + weight * linear.experts_B[e, r] * (linear.experts_A[e, r] * x).sum()
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(router_grad, loras, top_k, rank, B, T, seed):
    top_k = min(top_k, loras)
    linear, _ = make_linear(loras, top_k, rank, router_grad, seed)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, x, top_k, router_grad)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = {"x": x} if router_grad == "hard" else {"x": x, "gate": linear.gate.weight}
    ours = torch.autograd.grad((out * probe).sum(), named.values())
    theirs = torch.autograd.grad((slow * probe).sum(), named.values())
    for key, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_gate_loss_equals_a_loop_with_its_gradient(loras, B, T, seed):
    pairs = [make_linear(loras, 1, seed=seed + i) for i in range(2)]
    mask_BT = torch.rand(B, T) > 0.4
    mask_BT[:, 0] = True
    ids = [(seed + b) % loras for b in range(B)]
    xs = [torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True) for _ in pairs]
    theirs = 0.0
    for (linear, trace), x in zip(pairs, xs, strict=True):
        trace.token_mask_BT = mask_BT
        linear(x)
        for b, t in enumerate(ids):
            valid = [i for i in range(T) if mask_BT[b, i]]
            for i in valid:
                exps = [(g * x[b, i]).sum().exp() for g in linear.gate.weight]
                theirs = theirs - 50 * (exps[t] / sum(exps)).log() / len(valid) / B / 2
    trace.begin(["?"] * B, [NAMES[i] for i in ids])
    linears = [linear for linear, _ in pairs]
    ours = meteora._losses(linears, TaskIds(trace, NAMES[:loras]), config_of(loras, 1))["gate_loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    named = [*xs, *(linear.gate.weight for linear in linears)]
    for a, b in zip(torch.autograd.grad(ours, named), torch.autograd.grad(theirs, named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_lora_that_no_token_needs_changes_nothing():
    linear, trace = make_linear()
    with torch.no_grad():
        linear.gate.weight.zero_()
        linear.gate.weight[:, 0] = torch.tensor([1.0, 2.0, -9.0])
    x = torch.rand(2, 3, 5, dtype=torch.float64) + 0.1
    before = linear(x)
    before.sum().backward()
    assert not linear.gate.weight.grad[2].any()
    assert linear.experts_A.grad is None
    with torch.no_grad():
        linear.experts_A[2] = 77.0
    assert torch.equal(linear(x), before)
    assert trace.routes[0].choice_BT.eq(1).all()


def loaded(tiny_llava, tmp_path, **fields):
    """A mixture of two LoRAs that PEFT saved, with different ranks, scales and placement; and PEFT's models."""
    pefts = [
        peft_folder(tiny_llava(), tmp_path / "a", seed=1, r=2, lora_alpha=8),
        peft_folder(tiny_llava(), tmp_path / "b", seed=2, r=3, lora_alpha=5, leaves=("q_proj", "up_proj")),
    ]
    model, trace = tiny_llava(), Trace()
    folders = {"general": str(tmp_path / "a"), "document": str(tmp_path / "b")}
    config = meteora.Config(tasks=NAMES[:2], folders=folders, rank_per_expert=3, **fields)
    config.check()
    attached = meteora.attach(model, config, trace)
    trace.watch(model)
    return model, trace, attached, config, pefts


def test_with_one_lora_chosen_everywhere_the_model_is_that_lora(tiny_llava, batch, tmp_path):
    model, _, _, _, pefts = loaded(tiny_llava, tmp_path, top_k=1)
    for chosen, peft in enumerate(pefts):
        for module in model.modules():
            if isinstance(module, meteora.GatedLoRAs):
                # Scores that do not depend on the input.
                module.gate.forward = lambda x, e=chosen: torch.eye(2, dtype=x.dtype)[e].expand(
                    *x.shape[:2], 2
                )
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, peft(**batch).logits, rtol=1e-9, atol=1e-9)


def test_our_own_lora_folder_loads_and_one_lora_alone_equals_it(tiny_llava, batch, tmp_path):
    plain = tiny_llava()
    config = lora.Config(rank=2, alpha=5.0)
    described = lora.attach(plain, config, Trace())
    draw(plain, 4)
    weights = {name: w for name, w in plain.named_parameters() if w.requires_grad}
    adapters.save(tmp_path, weights, config, described, "tiny")
    mixed = tiny_llava()
    one = meteora.Config(tasks=["only"], folders={"only": str(tmp_path)}, top_k=1, rank_per_expert=2)
    one.check()
    meteora.attach(mixed, one, Trace())
    with torch.no_grad():
        torch.testing.assert_close(mixed(**batch).logits, plain(**batch).logits, rtol=1e-9, atol=1e-9)


def test_gates_alone_train_and_the_loras_are_saved_as_state(tiny_llava, batch, tmp_path):
    model, trace, attached, config, _ = loaded(tiny_llava, tmp_path)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("gate.weight")}
    assert attached.state == {name for name, _ in model.named_parameters() if ".experts_" in name}
    draw(model, 4)
    other, other_trace = tiny_llava(), Trace()
    described = meteora.attach(other, config.without_files(), other_trace)
    other_trace.watch(other)
    own = dict(other.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad or name in attached.state:
                own[name].copy_(weight)
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert (described.num_weights, described.state) == (attached.num_weights, attached.state)
    assert [path.name for path in config.files()] == ["adapter_config.json", "adapter_model.safetensors"] * 2


@pytest.mark.parametrize(("router_grad", "top_k"), [*((grad, 2) for grad in ROUTER_GRADS), ("scaled", 1)])
def test_task_loss_reaches_the_gates_exactly_as_declared_and_the_gate_loss_always(
    router_grad, top_k, tiny_llava, batch, tmp_path
):
    model, trace, attached, _, _ = loaded(tiny_llava, tmp_path, router_grad=router_grad, top_k=top_k)
    model.model.multi_modal_projector.requires_grad_(True)
    trace.begin(["?"] * 2, NAMES[:2])
    model(**batch).logits.square().sum().backward(retain_graph=True)
    gates = [w for name, w in model.named_parameters() if name.endswith("gate.weight")]
    heard = [w.grad is not None and bool(w.grad.abs().max() > 1e-12) for w in gates]
    assert heard == [attached.capabilities.router_hears_task_loss] * 14
    for weight in gates:
        weight.grad = None
    attached.losses(trace)["gate_loss"].backward()
    assert all(w.grad is not None and w.grad.any() for w in gates)


def test_padding_changes_neither_answer_nor_gate_loss_and_decoding_equals_the_full_forward(
    tiny_llava, batch, tmp_path
):
    model, trace, attached, _, _ = loaded(tiny_llava, tmp_path)
    draw(model, 3)
    ids, pixels, mask = batch["input_ids"][1:], batch["pixel_values"][1:], batch["attention_mask"][1:]
    trace.begin(["?"], ["document"])
    padded = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[0, :9]
    with_padding = attached.losses(trace)["gate_loss"]
    alone = model(input_ids=ids[:, :9], pixel_values=pixels).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(with_padding, attached.losses(trace)["gate_loss"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(decoded(model, ids[:, :9], pixels, 5)[0], alone, rtol=1e-9, atol=1e-11)


def test_an_unknown_task_and_folders_that_do_not_fit_are_named(tiny_llava, batch, tmp_path):
    model, trace, attached, config, _ = loaded(tiny_llava, tmp_path)
    trace.begin(["?"] * 2, ["general", "documents"])
    model(**batch)
    with pytest.raises(UserError, match="did you mean 'document'"):
        attached.losses(trace)
    Q = "model.language_model.layers.0.self_attn.q_proj"
    write_folder(tmp_path / "b", {f"{Q}.lora_A.weight": torch.ones(2, 16)})
    with pytest.raises(UserError, match=f"adapter.folders.document: .*b: lacks {Q}.lora_B.weight"):
        meteora.attach(tiny_llava(), config, Trace())


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": [], "folders": {}}, "tasks"), ({"folders": {"a": "x"}}, "folders"),
     ({"top_k": 3}, "top_k"), ({"top_k": 0}, "top_k"), ({"temperature": 0.0}, "temperature"),
     ({"gate_weight": 0.0, "top_k": 1}, "gate_weight"), ({"gate_weight": -1.0}, "gate_weight")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    good = {"tasks": ["a", "b"], "folders": {"a": "x", "b": "y"}}
    meteora.Config(**good).check()
    with pytest.raises(UserError, match=f"adapter.{key}: "):
        meteora.Config(**{**good, **fields}).check()


def test_trained_weights_equal_the_published_formula(tiny_llava, tmp_path):
    d, f, L, N = 16, 24, 2, 2
    attached = loaded(tiny_llava, tmp_path)[2]
    assert attached.num_weights == attached.num_active == L * N * (6 * d + f)


def test_gates_are_fp32_under_bf16():
    linear, trace = make_linear(dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    assert linear(x).dtype == torch.bfloat16
    assert linear.scores_BTE.dtype == trace.routes[0].probs_BTE.dtype == torch.float32
    wanted = [(g * x[1, 2].double()).sum() for g in linear.gate.weight.double()]
    torch.testing.assert_close(linear.scores_BTE[1, 2].double(), torch.stack(wanted), rtol=1e-5, atol=1e-6)
