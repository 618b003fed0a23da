"""EWC's Fisher and penalty and LwF's distance equal their definitions: float64 loops over samples, tokens, weights."""

import copy
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import references
from tests.training.runs import small
from tests.training.test_loop import COUNTS, SLOTS, Peek, set_up
from workloads.data.collate import train_batch
from workloads.errors import UserError
from workloads.llava.build import projector_weights
from workloads.training.batches import Batches
from workloads.training.loop import Loop
from workloads.training.past import NO_PAST, Past, ewc
from workloads.training.past.ewc import Anchors, Quadratic, read, squared_gradients
from workloads.training.past.lwf import Teacher

LAMBDA, TEMPERATURE = 0.7, 2.0


def shifted(model, seed, size=0.02):
    """Moves what trains by random amounts."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=dice).to(weight.dtype) * size


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def every_sample():
    pools = references.pools(COUNTS)
    return [pools[slot.domain].sample(slot.index) for slot in SLOTS]


def test_fisher_is_the_mean_of_squared_gradients_sample_by_sample():
    llava, trace, _ = set_up("lora")
    model, _ = references.doubled(llava.model)
    wanted = {name: torch.zeros_like(weight) for name, weight in trained(model).items()}
    for item in every_sample():
        losses, _ = references.taught(model, llava.processor, item)
        gradients = torch.autograd.grad(sum(losses), list(trained(model).values()))
        for name, gradient in zip(wanted, gradients, strict=True):
            wanted[name] += gradient**2
    llava.model.double().eval()
    batches = [train_batch([s], llava).to(torch.device("cpu"), torch.float64) for s in every_sample()]
    given = squared_gradients(llava.model, trace, batches)
    assert given.keys() == wanted.keys()
    for name, squares in wanted.items():
        assert float(squares.sum()) > 0, name
        # The loss itself is taken in fp32.
        torch.testing.assert_close(given[name], squares, rtol=1e-5, atol=1e-7 * float(squares.max()))
    assert trace.routes == []
    assert all(weight.grad is None for weight in llava.model.parameters())


def test_squares_of_a_batch_of_several_samples_are_refused():
    llava, trace, _ = set_up("lora")
    with pytest.raises(AssertionError, match="squares of sums"):
        squared_gradients(llava.model, trace, [train_batch(every_sample()[:2], llava)])


class Weights(torch.nn.Module):
    """A model of a few weights, some of which train."""

    def __init__(self, values, names):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone(), requires_grad=name in names))


NAMES = ("a", "b", "c", "d")
subsets = st.sets(st.sampled_from(NAMES))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(subsets, max_size=5), subsets.filter(bool), st.integers(0, 999), st.sampled_from([0.0, 1.0, 3.5])
)
def test_the_penalty_is_the_sum_of_one_term_a_stage(stages, now, seed, weight):
    """Each stage has a Fisher of some weights, with zeros in it; some weights train now."""
    dice = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(3, 2, generator=dice, dtype=torch.float64)

    def fisher():
        return draw().abs() * (torch.rand(3, 2, generator=dice) > 0.3) * 10.0 ** float(draw()[0, 0])

    terms = [({n: fisher() for n in sorted(names)}, {n: draw() for n in sorted(names)}) for names in stages]
    held = Quadratic()
    for place, (fishers, anchors) in enumerate(terms):
        held = held.plus(fishers, anchors, f"{place}")
    model = Weights({name: draw() for name in NAMES}, now)
    loss = Anchors(model=model, held=held, weight=weight).loss()
    total, slopes = 0.0, {name: torch.zeros(3, 2, dtype=torch.float64) for name in now}
    for fishers, anchors in terms:
        for name in sorted(now & fishers.keys()):
            for i in range(3):
                for j in range(2):
                    apart = model.get_parameter(name)[i, j].item() - anchors[name][i, j].item()
                    total += weight / 2 * fishers[name][i, j].item() * apart**2
                    slopes[name][i, j] += weight * fishers[name][i, j].item() * apart
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert held.stages == tuple(str(place) for place in range(len(terms)))
    if loss.requires_grad:
        loss.backward()
    for name in NAMES:
        given = model.get_parameter(name).grad
        given = torch.zeros(3, 2, dtype=torch.float64) if given is None else given
        torch.testing.assert_close(given, slopes.get(name, torch.zeros_like(given)), rtol=1e-9, atol=1e-9)


def test_what_ewc_leaves_behind_is_read_back_exactly_and_only_for_the_same_stages_and_samples(tmp_path):
    torch.manual_seed(0)
    held = Quadratic(num_samples=5)
    for stage in ("one", "two"):
        held = held.plus({"a.b": torch.rand(3)}, {"a.b": torch.randn(3)}, stage)
    path = tmp_path / "past.safetensors"
    assert read(path, 5, ["one", "two"]) is None
    Anchors(model=torch.nn.Module(), held=held, weight=1.0).save(path)
    again = read(path, 5, ["one", "two"])
    assert again is not None
    for part in ("precision", "mean", "constant"):
        assert torch.equal(getattr(again, part)["a.b"], getattr(held, part)["a.b"])
    assert (again.stages, again.num_samples) == (("one", "two"), 5)
    assert read(path, 6, ["one", "two"]) is read(path, 5, ["one"]) is read(path, 5, ["two", "one"]) is None
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="past.safetensors: cannot be read") as error:
        read(path, 5, ["one", "two"])
    assert "\n" not in str(error.value)


def test_the_batches_behind_a_fisher_are_made_one_at_a_time(monkeypatch, tmp_path):
    alive, most, taken = weakref.WeakSet(), [], []

    class Made:
        pass

    def make(config, llava, course, slot):
        batch = Made()
        alive.add(batch)
        most.append(len(alive))
        return batch

    def with_stage(self, stage, llava, attached, trace, batches, total):
        taken.append((sum(1 for _ in batches), total))
        return self

    monkeypatch.setattr(ewc, "_batch", make)
    monkeypatch.setattr(Quadratic, "with_stage", with_stage)
    stages = [SimpleNamespace(fingerprint=name, folder=tmp_path) for name in "ab"]
    course = SimpleNamespace(stages=stages, examples=lambda place, num: range(num - place))
    config = SimpleNamespace(continual=SimpleNamespace(fisher_samples=6))
    Quadratic.of(config, None, None, None, course, tmp_path)
    assert taken == [(6, 6), (5, 5)]
    assert max(most) <= 2


def gradients_of(llava, trace, attached, micro_batch, make_past):
    """The loop's report and gradient of one global batch under a past that `make_past(batches)` makes."""
    config = small("lora", optim={"global_batch": len(SLOTS)}, execution={"micro_batch": micro_batch})
    pools = references.pools(COUNTS)
    batches = Batches(config=config, llava=llava, pools=pools, stream=SLOTS)
    past = make_past(batches)
    peek = Peek(llava.model, config.optim, config.execution, projector_weights(llava.model))
    reports = []
    try:
        Loop(config, llava, attached, trace, peek, pools, SLOTS, past).run(Path("nowhere"), reports.append)
    finally:
        peek.close()
    return reports[0], peek.gradients


def check_gradients(given, wanted):
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        limit = 1e-4 * float(gradient.norm()) + 1e-6 * float(whole)
        assert float((given[name] - gradient).norm()) < limit, name


@pytest.mark.parametrize("micro_batch", [1, 4, 11])
def test_ewc_adds_its_penalty_and_gradient_once_whatever_the_micro_batches(micro_batch):
    llava, trace, attached = set_up("lora")
    dice = torch.Generator().manual_seed(5)
    names = [name for name in trained(llava.model) if "lora_B" in name or "projector" in name]
    named = trained(llava.model)
    fisher = {name: torch.rand(named[name].shape, generator=dice) for name in names}
    anchors = {name: named[name].detach().clone() for name in names}
    shifted(llava.model, 1)
    model, _ = references.doubled(llava.model)
    weights = trained(model)
    losses = [one for s in every_sample() for one in references.taught(model, llava.processor, s)[0]]
    penalty = sum(
        (fisher[name].double() * (weights[name] - anchors[name].double()) ** 2).sum() for name in names
    )
    penalty = LAMBDA / 2 * penalty
    total = sum(losses) / len(losses) + penalty
    wanted = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    held = Quadratic().plus(fisher, anchors, "one")
    past = Past(ewc=Anchors(model=llava.model, held=held, weight=LAMBDA))
    report, given = gradients_of(llava, trace, attached, micro_batch, lambda batches: past)
    assert report["ewc_loss"] == pytest.approx(penalty.item(), rel=1e-4)
    assert report["loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-4)
    check_gradients(given, wanted)


@pytest.mark.parametrize("micro_batch", [1, 4, 11])
def test_lwf_adds_the_mean_distance_of_tokens_from_what_the_start_said(micro_batch):
    llava, trace, attached = set_up("lora")
    shifted(llava.model, 2)
    teacher, _ = references.doubled(llava.model)
    start = copy.deepcopy(llava.model.state_dict())
    shifted(llava.model, 3)
    student, _ = references.doubled(llava.model)
    weights = trained(student)
    losses, distances = [], []
    for item in every_sample():
        losses += references.taught(student, llava.processor, item)[0]
        distances += distances_of(teacher, student, llava.processor, item)
    mean = LAMBDA * TEMPERATURE**2 * sum(distances) / len(distances)
    total = sum(losses) / len(losses) + mean
    wanted = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    now = copy.deepcopy(llava.model.state_dict())

    def make(batches):
        llava.model.load_state_dict(start)
        llava.model.eval()
        made = Teacher(llava.model, LAMBDA, TEMPERATURE)
        made.learn(batches, trace)
        llava.model.load_state_dict(now)
        return Past(lwf=made)

    report, given = gradients_of(llava, trace, attached, micro_batch, make)
    assert mean.item() > 1e-3
    assert report["lwf_loss"] == pytest.approx(mean.item(), rel=1e-3)
    assert report["loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-4)
    check_gradients(given, wanted)


def distances_of(teacher, student, processor, item):
    """KL(teacher_T || student_T) of each token of the answer, one entry of the vocabulary after the other."""
    ids, pixels = references.prompt(processor, item)
    answer = references.target(processor, item)
    whole = torch.cat([ids, torch.tensor([answer])], dim=1)
    rows = []
    for model in (teacher, student):
        logits_TV = model(input_ids=whole, pixel_values=pixels).logits[0] / TEMPERATURE
        places = range(ids.shape[1] - 1, whole.shape[1] - 1)
        rows.append([logits_TV[t] - (logits_TV[t] - 50).exp().sum().log() - 50 for t in places])
    return [
        sum(math.exp(t) * (t - s) for t, s in zip(taught.tolist(), said, strict=True))
        for taught, said in zip(*rows, strict=True)
    ]


def test_a_teacher_says_nothing_to_a_student_that_has_not_moved():
    llava, trace, attached = set_up("lora")
    made = {}

    def make(batches):
        llava.model.eval()
        made["teacher"] = Teacher(llava.model, 1.0, 3.0)
        made["teacher"].learn(batches, trace)
        return Past(lwf=made["teacher"])

    report, _ = gradients_of(llava, trace, attached, 4, make)
    assert report["lwf_loss"] == pytest.approx(0.0, abs=1e-5)
    width = llava.model.config.text_config.hidden_size
    tokens = sum(len(references.target(llava.processor, s)) for s in every_sample())
    assert sum(len(h) for h in made["teacher"].hidden.values()) == tokens
    assert {h.shape[1] for h in made["teacher"].hidden.values()} == {width}


def test_without_a_past_nothing_is_added():
    assert NO_PAST.losses(0, 0, 1.0, 5.0) == {}
