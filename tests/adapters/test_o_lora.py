"""O-LoRA against loops over slots in float64: what trains, what is summed, what is penalised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.decoding import decoded
from tests.adapters.folder_tools import add_plain, draw
from workloads.adapters import lora, o_lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.slots import SlotLinear
from workloads.errors import UserError

NAMES = ["general", "document", "biomedical", "maps"]


def randomise(module, seed=0, std=0.5):
    """Random values for all slots, also those that do not train."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if ".slot" in f".{name}":
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * std)


def make_linear(num_tasks=3, rank=2, with_past=True, current=0, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = o_lora.Config(
        tasks=NAMES[:num_tasks], rank_per_expert=rank, alpha=3.0, train_with_past=with_past
    )
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    linear = o_lora.adapted(base, config)
    randomise(linear, seed)
    linear.slots.start(current)
    return linear


def slow_linear(linear, x_BTI, slots, scale):
    """Token by token and slot by slot."""
    rows = []
    for sample in x_BTI:
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for slot in slots:
                A, B = getattr(linear.slots, f"slot{slot}_A"), getattr(linear.slots, f"slot{slot}_B")
                for r in range(len(A)):
                    out = out + scale * B[:, r] * (A[r] * x).sum()
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def slow_penalty(linears, current):
    """sum over linears, past slots, and pairs of rows of |a_t . a_i|."""
    total = torch.zeros((), dtype=torch.float64)
    for linear in linears:
        for past in range(current):
            for mine in getattr(linear.slots, f"slot{current}_A"):
                for theirs in getattr(linear.slots, f"slot{past}_A"):
                    total = total + (mine * theirs).sum().abs()
    return total


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 2),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_linear_and_penalty_equal_loops_forward_and_backward(
    num_tasks, rank, current, with_past, training, B, T, seed
):
    current = min(current, num_tasks - 1)
    linear = make_linear(num_tasks, rank, with_past, current, seed).train(training)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    slots = range(num_tasks)
    if training:
        slots = range(current + 1) if with_past else [current]
    out, slow = linear(x), slow_linear(linear, x, slots, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    trained = [w for w in linear.parameters() if w.requires_grad]
    assert len(trained) == 2
    config = o_lora.Config(tasks=NAMES[:num_tasks], orthogonality_weight=0.3)
    terms = o_lora._losses([linear], config)
    assert set(terms) == ({"orthogonality_loss"} if current else set())
    ours = (out * probe).sum() + sum(terms.values())
    theirs = (slow * probe).sum() + 0.3 * slow_penalty([linear], current)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(ours, [x, *trained]), torch.autograd.grad(theirs, [x, *trained])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_task_trains_its_own_slot_and_leaves_the_others_bitwise_as_they_were(tiny_llava, batch):
    model = tiny_llava()
    config = o_lora.Config(tasks=NAMES[:3], rank_per_expert=2)
    attached = o_lora.attach(model, config, Trace())
    randomise(model)
    attached.on_task_start("document")
    model.train()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss = model(**batch).logits.square().mean()
    (loss + sum(attached.losses(Trace()).values())).backward()
    optimizer.step()
    changed = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert changed == {name for name in before if ".slot1_" in name}
    assert len(changed) == 2 * 14


def test_the_penalty_of_the_model_is_the_sum_over_its_linears(tiny_llava, batch):
    model = tiny_llava()
    config = o_lora.Config(tasks=NAMES[:3], rank_per_expert=2, orthogonality_weight=0.7)
    attached = o_lora.attach(model, config, Trace())
    randomise(model)
    attached.on_task_start("biomedical")
    for checkpointing in (False, True):
        if checkpointing:
            model.train().activation_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch, use_cache=False).logits.square().mean()
        ours = attached.losses(Trace())["orthogonality_loss"]
        linears = [m for m in model.modules() if isinstance(m, SlotLinear)]
        torch.testing.assert_close(ours, 0.7 * slow_penalty(linears, 2), rtol=1e-10, atol=0)
        (loss + ours).backward()
    with torch.no_grad():
        model.eval()(**batch)
    assert all(linear.penalty is None for linear in linears)


def test_without_past_in_training_evaluation_still_sums_all_slots():
    linear = make_linear(3, with_past=False, current=2)
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    alone, together = slow_linear(linear, x, [2], 1.5), slow_linear(linear, x, [0, 1, 2], 1.5)
    assert (alone - together).abs().max() > 0.01
    torch.testing.assert_close(linear.train()(x), alone)
    torch.testing.assert_close(linear.eval()(x), together)


def test_slots_that_nothing_was_learned_in_change_nothing(tiny_llava, batch):
    plain, slotted = tiny_llava(), tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    attached = o_lora.attach(slotted, o_lora.Config(tasks=NAMES, rank_per_expert=2, alpha=4.0), Trace())
    draw(plain, 5)
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in slotted.named_parameters():
            if weight.requires_grad:
                weight.copy_(source[name.replace("slots.slot0_", "lora_") + ".weight"])
        torch.testing.assert_close(plain(**batch).logits, slotted(**batch).logits, rtol=1e-9, atol=1e-9)
        slotted.train()
        torch.testing.assert_close(plain(**batch).logits, slotted(**batch).logits, rtol=1e-9, atol=1e-9)
    slotted(**batch)
    assert attached.losses(Trace()) == {}


def test_the_plain_lora_equals_the_forward(tiny_llava, batch):
    model = tiny_llava()
    attached = o_lora.attach(model, o_lora.Config(tasks=NAMES[:3], rank_per_expert=2), Trace())
    randomise(model, 2, 0.3)
    plain = attached.as_lora(None)
    assert all(len(A) == 3 * 2 for A, _, _ in plain.values())
    with torch.no_grad():
        ours = add_plain(tiny_llava(), plain)(**batch).logits
        torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-9, atol=1e-9)


def test_state_names_all_slots_so_that_a_saved_model_has_its_past(tiny_llava, batch):
    config = o_lora.Config(tasks=NAMES[:3], rank_per_expert=2)
    model, other = tiny_llava(), tiny_llava()
    attached = o_lora.attach(model, config, Trace())
    o_lora.attach(other, config, Trace())
    randomise(model)
    attached.on_task_start("document")
    saved = {n: w for n, w in model.named_parameters() if w.requires_grad or n in attached.state}
    own = dict(other.named_parameters())
    assert attached.state == {name for name in own if ".slots." in name}
    with torch.no_grad():
        for name, weight in saved.items():
            own[name].copy_(weight)
        assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_decoding_with_a_cache_equals_the_full_forward(tiny_llava, batch):
    model = tiny_llava()
    o_lora.attach(model, o_lora.Config(tasks=NAMES, rank_per_expert=2), Trace())
    randomise(model)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=pixels).logits
        steps = decoded(model, ids[:, :12], pixels, 7)
    torch.testing.assert_close(steps, full, rtol=1e-9, atol=1e-11)


def test_an_unknown_task_names_the_nearest(tiny_llava):
    attached = o_lora.attach(tiny_llava(), o_lora.Config(tasks=NAMES), Trace())
    with pytest.raises(UserError, match="did you mean 'document'"):
        attached.on_task_start("documents")


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"rank_per_expert": 0}, "rank_per_expert"),
     ({"orthogonality_weight": -0.1}, "orthogonality_weight"), ({"dropout": 1.0}, "dropout")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    o_lora.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=f"adapter.{key}: "):
        o_lora.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_weights_are_those_of_one_slot(tiny_llava):
    d, f, L, r = 16, 24, 2, 3
    attached = o_lora.attach(tiny_llava(), o_lora.Config(tasks=NAMES, rank_per_expert=r), Trace())
    assert attached.num_weights == attached.num_active == L * r * (8 * d + 3 * (d + f))


def test_the_penalty_is_fp32_under_bf16():
    linear = make_linear(2, current=1, dtype=torch.bfloat16).train()
    assert linear(torch.randn(1, 2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert linear.penalty.dtype == torch.float32
    wanted = slow_penalty([linear.double()], 1)
    torch.testing.assert_close(linear.penalty.double(), wanted, rtol=1e-5, atol=0)
