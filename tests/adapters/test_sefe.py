"""SEFE's RegLoRA against loops over entries in float64: what is summed, marked and penalised, over tasks in order."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.folder_tools import add_plain
from tests.adapters.streams import TASKS, batch_of, learn, logits, step
from workloads import adapters
from workloads.adapters import sefe
from workloads.adapters.base import Trace
from workloads.adapters.parts.slots import SlotLinear
from workloads.errors import UserError

NAMES = ["general", "document", "biomedical", "maps"]


def randomise(slots, seed=0, std=0.5):
    """Random values for all slots, also those that do not train."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in slots.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * std)


def factors(slots, k):
    return slots.get_parameter(f"slot{k}_A"), slots.get_parameter(f"slot{k}_B")


def make_linear(num_tasks=3, rank=2, share=0.3, current=0, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = sefe.Config(tasks=NAMES[:num_tasks], rank_per_expert=rank, alpha=3.0, marked_share=share)
    linear = sefe.adapted(nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False), config)
    randomise(linear.slots, seed)
    linear.slots.start(current)
    return linear, config


def product(A, B, o, i):
    """One entry of B A."""
    return sum(B[o, r] * A[r, i] for r in range(len(A)))


def slow_marks(A, B, num_marks):
    """The places of the largest entries, largest first."""
    entries = [
        (abs(float(product(A, B, o, i).detach())), o, i) for o in range(len(B)) for i in range(A.shape[1])
    ]
    return [(o, i) for _, o, i in sorted(entries, reverse=True)[:num_marks]]


def slow_penalty(slots, current, num_marks):
    """Mean of |B A| of the current slot over the lists of all slots before it, joined."""
    A, B = factors(slots, current)
    marked = [place for k in range(current) for place in slow_marks(*factors(slots, k), num_marks)]
    return sum(product(A, B, o, i).abs() for o, i in marked) / len(marked)


def slow_linear(linear, x_BTI, used, scale):
    rows = []
    for sample in x_BTI:
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for k in used:
                A, B = factors(linear.slots, k)
                for r in range(len(A)):
                    out = out + scale * B[:, r] * (A[r] * x).sum()
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.sampled_from([0.02, 0.3, 1.0]),
    st.integers(1, 2), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_linear_and_penalty_equal_loops_forward_and_backward(
    num_tasks, rank, current, training, share, B, T, seed
):
    current = min(current, num_tasks - 1)
    linear, config = make_linear(num_tasks, rank, share, current, seed)
    linear.train(training)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    used = range(current + 1) if training else range(num_tasks)
    out, slow = linear(x), slow_linear(linear, x, used, 3.0 / rank)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-12)
    terms = sefe._losses([linear], config)
    assert set(terms) == ({"marked_loss"} if training and current else set())
    probe = torch.randn_like(out)
    ours, theirs = (out * probe).sum() + sum(terms.values()), (slow * probe).sum()
    if terms:
        num_marks = max(1, int(share * 20))
        theirs = theirs + 2500.0 * slow_penalty(linear.slots, current, num_marks)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    trained = [w for w in linear.parameters() if w.requires_grad]
    assert [id(w) for w in trained] == [id(w) for w in factors(linear.slots, current)]
    gradients = torch.autograd.grad(ours, [x, *trained]), torch.autograd.grad(theirs, [x, *trained])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [1, 7, 12, 10_000])
def test_blocks_change_neither_marks_nor_the_penalty(block, monkeypatch):
    torch.manual_seed(0)
    A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (4, 2)))
    monkeypatch.setattr(sefe, "_BLOCK", block)
    places = sefe.largest_entries(A, B, 6)
    assert sorted((int(p) // 5, int(p) % 5) for p in places) == sorted(slow_marks(A, B, 6))
    # An entry that is there twice counts twice.
    twice = torch.cat([places, places[:2]]).int()
    ours = sefe.marked_mean(A, B, twice)
    entries = [product(A, B, int(p) // 5, int(p) % 5).abs() for p in twice]
    theirs = sum(entries) / len(entries)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [A, B]), torch.autograd.grad(theirs, [A, B]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_backward_keeps_nothing_of_the_marked_entries_but_signs():
    A, B = torch.randn(8, 50, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    places = torch.arange(2000, dtype=torch.int32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        sefe.marked_mean(A, B, places)
    weights = {w.data_ptr() for w in (A, B, places)}
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in weights) == 2000


def attached(tiny_llava, seed=0, **settings_):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    config = sefe.Config(**{"tasks": list(TASKS), "rank_per_expert": 2, "marked_share": 0.1, **settings_})
    described = sefe.attach(model, config, trace)
    trace.watch(model)
    return model, trace, described


def test_a_task_changes_its_own_slot_alone_and_marks_what_was_learned_before_it(tiny_llava):
    model, trace, described = attached(tiny_llava, marked_weight=1.0)
    linears = {p: m.slots for p, m in model.named_modules() if isinstance(m, SlotLinear)}
    for number, task in enumerate(TASKS):
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        described.on_task_start(task)
        for slots in linears.values():
            width, marks = slots.slot0_A.shape[1], slots.marked_N.tolist()
            assert len(marks) == number * slots.num_marks
            for k in range(number):
                mine = marks[k * slots.num_marks : (k + 1) * slots.num_marks]
                expected = slow_marks(*factors(slots, k), slots.num_marks)
                assert sorted(divmod(m, width) for m in mine) == sorted(expected)
        model.train()
        step(model, trace, described, task, lr=0.5)
        step(model, trace, described, task, lr=0.5)
        described.on_task_end(task)
        changed = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
        assert changed == {name for name in before if f"slot{number}_" in name}


def test_the_loss_is_the_mean_over_linears(tiny_llava):
    model, trace, described = attached(tiny_llava, marked_weight=0.7)
    learn(model, trace, described, TASKS[:2], lr=0.5)
    described.on_task_start(TASKS[2])
    linears = [m.slots for m in model.modules() if isinstance(m, SlotLinear)]
    for slots in linears:
        randomise(slots, 3)
        slots.start(2)
    model.train()(**batch_of(TASKS[2]))
    expected = sum(slow_penalty(slots, 2, slots.num_marks) for slots in linears) / len(linears)
    found = described.losses(trace)["marked_loss"]
    torch.testing.assert_close(found, 0.7 * expected, rtol=1e-10, atol=0)
    with torch.no_grad():
        model.eval()(**batch_of(TASKS[2]))
    assert described.losses(trace) == {}


def test_a_heavier_weight_keeps_marked_entries_smaller(tiny_llava):
    def size(weight):
        model, trace, described = attached(tiny_llava, marked_weight=weight)
        learn(model, trace, described, TASKS[:1], num_steps=4, lr=0.5)
        described.on_task_start(TASKS[1])
        model.train()
        for _ in range(20):
            step(model, trace, described, TASKS[1], lr=0.02)
        linears = [m.slots for m in model.modules() if isinstance(m, SlotLinear)]
        return float(sum(slow_penalty(slots, 1, slots.num_marks) for slots in linears).detach())

    assert size(5.0) < 0.6 * size(0.0)


def test_slots_that_learned_nothing_mark_nothing(tiny_llava):
    model, _, described = attached(tiny_llava)
    described.on_task_start(TASKS[2])
    for module in model.modules():
        if isinstance(module, sefe.Slots):
            assert module.marked_N.shape == (0,)
            assert module.marked_N.dtype == torch.int32


def test_it_says_how_many_bytes_the_marks_of_the_last_task_take(tiny_llava):
    model, _, described = attached(tiny_llava)
    found = [module for module in model.modules() if isinstance(module, sefe.Slots)]
    for slots in found:
        randomise(slots)
    described.on_task_start(TASKS[2])
    assert described.formed == sum(len(slots.marked_N) * slots.marked_N.element_size() for slots in found)
    one = sefe.attach(tiny_llava(), sefe.Config(tasks=["a"], rank_per_expert=2), Trace())
    assert one.formed == 0


def test_merged_it_gives_equal_answers(tiny_llava):
    model, trace, described = attached(tiny_llava)
    learn(model, trace, described, lr=0.5)
    before = logits(model, trace, TASKS[0])
    plain = described.as_lora(None)
    with torch.no_grad():
        summed = add_plain(tiny_llava(), plain)(**batch_of(TASKS[0])).logits
    torch.testing.assert_close(summed, before, rtol=1e-9, atol=1e-11)
    adapters.merge(model, described)
    torch.testing.assert_close(logits(model, trace, TASKS[0]), before, rtol=1e-9, atol=1e-11)


def test_weights_are_those_of_one_slot_and_nothing_but_slots_is_saved(tiny_llava):
    d, f, L, r = 16, 24, 2, 2
    model, trace, described = attached(tiny_llava)
    learn(model, trace, described)
    assert described.num_weights == described.num_active == L * r * (8 * d + 3 * (d + f))
    assert len(described.state) == sum(".slots.slot" in name for name in described.state) == 3 * 2 * 14
    assert adapters.saved_names(model, described) == described.state
    assert not any("marked" in name for name in model.state_dict())


def test_marks_of_a_stage_that_goes_on_are_those_that_it_started_with(tiny_llava):
    """From the folder of the stage before, then from the checkpoint; forward copies none of them."""
    model, trace, described = attached(tiny_llava)
    learn(model, trace, described, TASKS[:2], lr=0.5)
    other, _, other_described = attached(tiny_llava, seed=1)
    start = {name: w.clone() for name, w in adapters.weights_of(model, described).items()}
    adapters.put(other, start, adapters.saved_names(other, other_described), "start")
    other_described.on_task_start(TASKS[2])
    described.on_task_start(TASKS[2])
    model.train()
    step(model, trace, described, TASKS[2], lr=0.5)
    here, there = ([m for m in x.modules() if isinstance(m, sefe.Slots)] for x in (model, other))
    for a, b in zip(here, there, strict=True):
        assert len(a.marked_N) == 2 * a.num_marks
        assert torch.equal(a.marked_N, b.marked_N)
    seen = []
    with patch.object(sefe, "marked_mean", side_effect=lambda A, B, places: seen.append(places) or A.sum()):
        model(**batch_of(TASKS[2]))
    assert [id(places) for places in seen] == [id(a.marked_N) for a in here]


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"rank_per_expert": 0}, "rank_per_expert"), ({"marked_share": 0.0}, "marked_share"),
     ({"marked_share": 1.5}, "marked_share"), ({"marked_weight": -1.0}, "marked_weight"), ({"alpha": 0.0}, "alpha")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    sefe.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=rf"adapter\.{key}: "):
        sefe.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_an_unknown_task_names_the_nearest(tiny_llava):
    _, _, described = attached(tiny_llava)
    with pytest.raises(UserError, match="did you mean 'document'"):
        described.on_task_start("documents")


def test_the_penalty_is_fp32_under_bf16():
    linear, _ = make_linear(2, current=1, dtype=torch.bfloat16)
    linear.train()
    assert linear(torch.randn(1, 2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert linear.penalty.dtype == torch.float32
    linear.penalty.backward()
    assert linear.slots.slot1_A.grad.dtype == torch.bfloat16
    places = linear.slots.marked_N.tolist()
    A, B = (w.double() for w in factors(linear.slots, 1))
    expected = sum(product(A, B, *divmod(p, 5)).abs() for p in places) / len(places)
    torch.testing.assert_close(linear.penalty.double(), expected, rtol=1e-5, atol=0)
