"""DISCO's slots against loops over tasks and ranks in float64: one slot in training, weighted ones in inference."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters.folder_tools import add_plain
from tests.adapters.streams import TASKS, batch_of, begin, learn, logits, step
from tests.llava.sentences import write_encoder
from workloads import adapters
from workloads.adapters import disco
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError

ALPHA = 3.0


def make_linear(weights_BK, known, current, num_tasks=3, rank=2, seed=0, dtype=torch.float64):
    """One linear with random slots; what it asks of the task means is given."""
    torch.manual_seed(seed)
    means = SimpleNamespace(weights_BK=weights_BK, known=known, current=current, trace=Trace())
    config = disco.Config(tasks=[f"t{k}" for k in range(num_tasks)], rank_per_expert=rank, alpha=ALPHA)
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    linear = disco.WeightedSlots(base, config, means, Spot(path="q_proj", layer=0, leads=True))
    with torch.no_grad():
        for name, weight in linear.named_parameters():
            if name.startswith("slot"):
                weight.normal_(std=0.5)
                weight.requires_grad_(True)
    return linear


def factors(linear, slot):
    return linear.get_parameter(f"slot{slot}_A"), linear.get_parameter(f"slot{slot}_B")


def slow(linear, x_BTI, weights_BK, used):
    """Token by token, task by task and rank by rank."""
    rows = []
    for sample, weights in zip(x_BTI, weights_BK, strict=True):
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for k in used:
                A, B = factors(linear, k)
                for r in range(len(A)):
                    out = out + weights[k] * ALPHA / len(A) * (A[r] * x).sum() * B[:, r]
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.booleans(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data(),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(training, num_tasks, rank, B, T, data, seed):
    known = sorted(data.draw(st.sets(st.integers(0, num_tasks - 1), min_size=1)))
    current = data.draw(st.sampled_from(known))
    torch.manual_seed(seed)
    weights_BK = torch.rand(B, num_tasks, dtype=torch.float64)
    linear = make_linear(weights_BK, known, current, num_tasks, rank, seed).train(training)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    used = [current] if training else known
    out, expected = linear(x), slow(linear, x, weights_BK, used)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    named = [x, *(w for k in used for w in factors(linear, k))]
    ours = torch.autograd.grad((out * probe).sum(), named)
    theirs = torch.autograd.grad((expected * probe).sum(), named)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def attached(tiny_llava, tmp_path, seed=0):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    encoder = write_encoder(tmp_path / "encoder")
    config = disco.Config(tasks=list(TASKS), rank_per_expert=2, encoder=encoder)
    config.check()
    described = disco.attach(model, config, trace)
    trace.watch(model)
    return model, trace, described


@pytest.mark.parametrize("num_learned", [2, 3])
def test_inference_weighs_seen_tasks_by_the_softmax_of_their_text_cosines(num_learned, tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described, TASKS[:num_learned], lr=0.5)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, disco.WeightedSlots)}
    encoder = model.disco_means.encoder
    # Both questions of a task are the same, so that its mean is their vector.
    texts = {}
    for task in TASKS:
        begin(trace, task)
        texts[task] = encoder.vectors(trace.questions).double()[0]
    for task in TASKS:
        ours = logits(model, trace, task)
        cosines = [
            float((texts[task] * texts[other]).sum() / (texts[task].norm() * texts[other].norm()))
            for other in TASKS[:num_learned]
        ]
        powers = [float(torch.tensor(c / 0.05, dtype=torch.float64).exp()) for c in cosines]
        plain = tiny_llava()
        for path, linear in linears.items():
            for k, power in enumerate(powers):
                add_plain(plain, {path: (*factors(linear, k), 8.0 * power / sum(powers))})
        valid = batch_of(task)["attention_mask"].bool()
        with torch.no_grad():
            # Means are in units of 2^-20.
            torch.testing.assert_close(
                ours[valid], plain(**batch_of(task)).logits[valid], rtol=1e-5, atol=1e-5
            )


def test_training_reads_and_changes_the_slot_of_its_task_alone(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    for number, task in enumerate(TASKS):
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        described.on_task_start(task)
        model.train()
        first = step(model, trace, described, task)
        step(model, trace, described, task)
        described.on_task_end(task)
        changed = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
        assert changed == {name for name in before if f"slot{number}_" in name}
        labels = batch_of(task)["input_ids"].masked_fill(batch_of(task)["attention_mask"] == 0, -100)
        with torch.no_grad():
            base = tiny_llava()(**batch_of(task), labels=labels).loss
        torch.testing.assert_close(first, base, rtol=1e-12, atol=0)


def test_every_block_reports_the_same_weights(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described)
    begin(trace, TASKS[1])
    with torch.no_grad():
        model(**batch_of(TASKS[1]))
    assert [route.layer for route in trace.routes] == [0, 1]
    assert torch.equal(trace.routes[0].probs_BTE, trace.routes[1].probs_BTE)
    assert trace.routes[1].choice_BT[0, 0] == 1


def test_weights_are_those_of_one_slot_and_means_are_of_texts_alone(tiny_llava, tmp_path):
    d, f, L, r = 16, 24, 2, 2
    model, _, described = attached(tiny_llava, tmp_path)
    assert described.num_weights == described.num_active == L * r * (8 * d + 3 * (d + f))
    assert model.disco_means.sums_KW.shape == (3, model.disco_means.encoder.width)
    assert sum(".slot" in name for name in described.state) == 3 * 2 * 14


def test_merging_says_why_not(tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path)
    with pytest.raises(UserError, match="cannot be merged: disco weighs .* for every sample"):
        adapters.merge(model, described)


def test_bf16_weights_give_bf16_outputs():
    weights_BK = torch.rand(2, 3, dtype=torch.float64)
    linear = make_linear(weights_BK, [0, 2], 2, dtype=torch.bfloat16).eval()
    x = torch.randn(2, 3, 5).bfloat16()
    out = linear(x)
    assert out.dtype == torch.bfloat16
    expected = slow(linear.double(), x.double(), weights_BK, [0, 2])
    assert (out.double() - expected).abs().max() < 2**-6 * expected.abs().max()
