"""HiDe-LLaVA against loops over tasks and ranks in float64: one slot in training, merged and mixed in inference."""

import importlib
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
from workloads.adapters import disco, hide_lora, lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.placing import Spot
from workloads.errors import UserError

ALPHA = 3.0


def stand_in(weights_BK, known, current):
    """What linears ask of the task means."""
    return SimpleNamespace(weights_BK=weights_BK, known=known, current=current, trace=Trace())


def make_linear(means, num_tasks=3, rank=2, mixes=False, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = hide_lora.Config(tasks=[f"t{k}" for k in range(num_tasks)], rank_per_expert=rank, alpha=ALPHA)
    base = nn.Linear(5, 4, bias=False, dtype=dtype).requires_grad_(False)
    spot = Spot(path="q_proj", layer=3, leads=True)
    linear = hide_lora.HideLinear(base, config, means, spot, mixes=mixes)
    with torch.no_grad():
        for name, weight in linear.named_parameters():
            if name.startswith("slot"):
                weight.normal_(std=0.5)
                weight.requires_grad_(True)
    return linear


def factors(linear, slot):
    return linear.get_parameter(f"slot{slot}_A"), linear.get_parameter(f"slot{slot}_B")


def slow(linear, x_BTI, pairs_of):
    """Token by token: W x + s sum of (weight, A, B) that `pairs_of(b)` gives for the sample, rank by rank."""
    rows = []
    for b, sample in enumerate(x_BTI):
        tokens = []
        for x in sample:
            out = linear.base_layer.weight @ x
            for weight, A, B in pairs_of(b):
                for r in range(len(A)):
                    out = out + weight * ALPHA / len(A) * (A[r] * x).sum() * B[:, r]
            tokens.append(out)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["training", "merged", "mixed"]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 3), st.data(), st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(form, num_tasks, rank, B, T, data, seed):
    known = sorted(data.draw(st.sets(st.integers(0, num_tasks - 1), min_size=1)))
    current = data.draw(st.sampled_from(known))
    torch.manual_seed(seed)
    weights_BK = torch.rand(B, num_tasks, dtype=torch.float64)
    linear = make_linear(stand_in(weights_BK, known, current), num_tasks, rank, form == "mixed", seed)
    linear.train(form == "training")
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)

    def pairs(b):
        if form == "training":
            return [(1.0, *factors(linear, current))]
        if form == "mixed":
            return [(weights_BK[b, k], *factors(linear, k)) for k in known]
        A, B = (sum(factors(linear, k)[i] for k in known) for i in (0, 1))
        return [(1.0, A, B)]

    out, expected = linear(x), slow(linear, x, pairs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    used = [current] if form == "training" else known
    named = [x, *(w for k in used for w in factors(linear, k))]
    ours = torch.autograd.grad((out * probe).sum(), named)
    theirs = torch.autograd.grad((expected * probe).sum(), named)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def attached(tiny_llava, tmp_path, method=hide_lora, seed=0, **settings_):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    encoder = write_encoder(tmp_path / "encoder")
    kind = importlib.import_module(f"workloads.adapters.{method.__name__.rpartition('.')[2]}").Config
    config = kind(**{"tasks": list(TASKS), "rank_per_expert": 2, "encoder": encoder, **settings_})
    config.check()
    described = method.attach(model, config, trace)
    trace.watch(model)
    return model, trace, described


def slow_weights(model, trace, seen, temperature, with_images=True):
    """Softmax over tasks of the cosines of one sample with means that loops take of all batches of the stream."""
    encoder = next(m.encoder for m in model.modules() if hasattr(m, "sums_KW"))
    features = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: features.append(args[0].detach())
    )
    vectors = {}
    for task in TASKS:
        logits(model, trace, task)
        texts = encoder.vectors(trace.questions).double()
        images = features[-1].mean(dim=1)
        vectors[task] = [*zip(texts, images, strict=True)]
    hook.remove()

    def cosine(a, b):
        return float((a * b).sum() / (a.norm() * b.norm()))

    def weights(task, b):
        powers = []
        for other in seen:
            kinds = (0, 1) if with_images else (0,)
            means = [sum(sample[i] for sample in vectors[other]) / 2 for i in kinds]
            found = [cosine(vectors[task][b][i], mean) for i, mean in zip(kinds, means, strict=True)]
            powers.append(torch.tensor(sum(found) / len(found) / temperature).double().exp())
        return [float(p / sum(powers)) for p in powers]

    return weights


@pytest.mark.parametrize("num_learned", [1, 2, 3])
def test_inference_merges_seen_tasks_below_the_last_block_and_mixes_them_in_it(
    num_learned, tiny_llava, tmp_path
):
    model, trace, described = attached(tiny_llava, tmp_path)
    seen = TASKS[:num_learned]
    learn(model, trace, described, seen, lr=0.5)
    weights = slow_weights(model, trace, seen, 0.1)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, hide_lora.HideLinear)}
    for task in TASKS:
        ours = logits(model, trace, task)
        for b in range(2):
            plain = tiny_llava()
            shares = weights(task, b)
            for path, linear in linears.items():
                pairs = [factors(linear, k) for k in range(num_learned)]
                if ".layers.0." in path:
                    A, B = (sum(pair[i] for pair in pairs) for i in (0, 1))
                    add_plain(plain, {path: (A, B, 8.0)})
                else:
                    for share, (A, B) in zip(shares, pairs, strict=True):
                        add_plain(plain, {path: (A, B, 8.0 * share)})
            with torch.no_grad():
                expected = plain(**{key: value[b : b + 1] for key, value in batch_of(task).items()}).logits[0]
            valid = batch_of(task)["attention_mask"][b].bool()
            # Means are in units of 2^-20.
            torch.testing.assert_close(ours[b][valid], expected[valid], rtol=1e-5, atol=1e-5)


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
        assert len(changed) == 2 * 14
        # A new task starts at the base, whatever was learned before.
        labels = batch_of(task)["input_ids"].masked_fill(batch_of(task)["attention_mask"] == 0, -100)
        with torch.no_grad():
            base = tiny_llava()(**batch_of(task), labels=labels).loss
        torch.testing.assert_close(first, base, rtol=1e-12, atol=0)
    assert model.hide_means.counts_K.tolist() == [4, 4, 4]


@pytest.mark.parametrize("method", [hide_lora, disco])
def test_one_task_equals_plain_lora(method, tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path, method)
    learn(model, trace, described, TASKS[:1])
    plain = tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=16.0), Trace())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if ".lora_" in name:
                weight.copy_(own[name.replace("lora_", "slot0_").removesuffix(".weight")])
        expected = plain(**batch_of(TASKS[2])).logits
    torch.testing.assert_close(logits(model, trace, TASKS[2]), expected, rtol=1e-9, atol=1e-11)


def test_the_route_is_the_last_blocks_mixture(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described)
    begin(trace, TASKS[1])
    with torch.no_grad():
        model(**batch_of(TASKS[1]))
    (route,) = trace.routes
    assert route.layer == 1
    mixture_BK = (model.hide_means.closeness_BK / 0.1).softmax(dim=-1)
    assert torch.equal(route.probs_BTE[:, 3], mixture_BK)
    assert route.choice_BT[0, 0] == TASKS.index(described.selected()[0])


def test_weights_are_those_of_one_slot_and_every_slot_is_saved(tiny_llava, tmp_path):
    d, f, L, r = 16, 24, 2, 2
    model, _, described = attached(tiny_llava, tmp_path)
    assert described.num_weights == described.num_active == L * r * (8 * d + 3 * (d + f))
    names = adapters.saved_names(model, described)
    assert sum(".slot" in name for name in names) == 3 * 2 * 14
    assert {name for name in names if ".slot" not in name} == {
        "hide_means.seen_K",
        "hide_means.counts_K",
        "hide_means.sums_KW",
    }


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"rank_per_expert": 0}, "rank_per_expert"), ({"temperature": 0.0}, "temperature"),
     ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"targets": ["gate"]}, "targets")],
)  # fmt: skip
@pytest.mark.parametrize("method", [hide_lora, disco])
def test_values_out_of_range_are_named(method, fields, key):
    method.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=rf"adapter\.{key}: "):
        method.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_an_unknown_task_names_the_nearest_and_merging_says_why_not(tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path)
    with pytest.raises(UserError, match="did you mean 'document'"):
        described.on_task_start("documents")
    with pytest.raises(UserError, match="cannot be merged: hide_lora mixes .* for every sample"):
        adapters.merge(model, described)


def test_bf16_weights_give_bf16_outputs():
    weights_BK = torch.rand(2, 3, dtype=torch.float64)
    linear = make_linear(stand_in(weights_BK, [0, 2], 2), mixes=True, dtype=torch.bfloat16).eval()
    x = torch.randn(2, 3, 5).bfloat16()
    out = linear(x)
    assert out.dtype == torch.bfloat16
    linear.double()
    expected = slow(linear, x.double(), lambda b: [(weights_BK[b, k], *factors(linear, k)) for k in (0, 2)])
    assert (out.double() - expected).abs().max() < 2**-6 * expected.abs().max()
