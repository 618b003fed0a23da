"""The loss of a global batch is a mean over its supervised tokens, and its gradient is that mean's gradient.

The reference is a float64 loop over samples and tokens (tests/references.py), whatever the micro-batches are.
"""

from dataclasses import replace

import pytest
import torch

from tests import references
from tests.training.runs import small
from workloads import adapters
from workloads.adapters.base import Trace
from workloads.data.mixture import Slot
from workloads.llava.build import build, projector_weights, train_projector
from workloads.training import engine
from workloads.training.loop import Loop

COUNTS = {"general": 5, "document": 4, "biomedical": 2}
SLOTS = [Slot(domain=domain, index=i) for i in range(5) for domain in sorted(COUNTS) if i < COUNTS[domain]]
METHODS = {"lora": {}, "mole": {"router_grad": "scaled", "balance_weight": 0.7}}


class Peek(engine.Engine):
    """An engine that shows the gradient of a global batch instead of taking the step."""

    def step(self, factor):
        named = dict(self.engine.module.named_parameters())
        self.gradients = {k: w.grad.double().clone() for k, w in named.items() if w.requires_grad}


def set_up(method):
    """A base with a random adapter of `method`, and what the loop needs beside it."""
    engine.join()
    config = small(method, adapter_fields=METHODS[method], optim={"global_batch": len(SLOTS)})
    llava, trace = build(config.model, "fp32"), Trace()
    torch.manual_seed(0)
    attached = adapters.attach(llava.model, config.adapter, trace)
    trace.watch(llava.model)
    train_projector(llava.model)
    with torch.no_grad():
        for name, weight in llava.model.named_parameters():
            if "experts_B" in name or "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * 0.02)
    return llava, trace, attached


@pytest.fixture(scope="module", params=sorted(METHODS))
def reference(request):
    """Method, and the report and gradient that the definition gives."""
    llava, _, _ = set_up(request.param)
    model, listener = references.doubled(llava.model)
    pools = references.pools(COUNTS)
    losses, balances = {domain: [] for domain in COUNTS}, []
    for slot in SLOTS:
        losses[slot.domain] += references.taught(
            model, llava.processor, pools[slot.domain].sample(slot.index)
        )[0]
        if scores := listener.take():
            balances.append(references.balance(scores))
    every = [one for of_domain in losses.values() for one in of_domain]
    wanted = {f"loss/{domain}": sum(of_domain) / len(of_domain) for domain, of_domain in losses.items()}
    wanted["loss"] = total = sum(every) / len(every)
    if balances:
        wanted["balance_loss"] = 0.7 * sum(balances) / len(balances)
        total = total + wanted["balance_loss"]
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    gradients = torch.autograd.grad(total, list(named.values()))
    report = {key: value.item() for key, value in wanted.items()}
    return request.param, report, dict(zip(named, gradients, strict=True))


def looped(method, micro_batch, folder):
    """The loop's report and gradient of one global batch."""
    llava, trace, attached = set_up(method)
    config = small(
        method,
        adapter_fields=METHODS[method],
        optim={"global_batch": len(SLOTS)},
        execution={"micro_batch": micro_batch},
    )
    peek = Peek(llava.model, config.optim, config.execution, projector_weights(llava.model))
    reports = []
    try:
        loop = Loop(config, llava, attached, trace, peek, references.pools(COUNTS), SLOTS)
        outcome = loop.run(folder, reports.append)
    finally:
        peek.close()
    assert len(reports) == 1
    return reports[0], peek.gradients, outcome


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 11])
def test_loss_and_gradient_are_those_of_the_mean_over_all_supervised_tokens(micro_batch, reference, tmp_path):
    method, wanted, gradients = reference
    report, given, outcome = looped(method, micro_batch, tmp_path)
    assert {key: report[key] for key in wanted} == pytest.approx(wanted, rel=2e-5)
    assert ("balance_loss" in report) == (method == "mole")
    assert outcome.train_loss == pytest.approx({d: wanted[f"loss/{d}"] for d in COUNTS}, rel=2e-5)
    assert given.keys() == gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert float((given[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + 1e-6 * float(whole), (
            name
        )
        assert float(gradient.norm()) > 0, name


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_mean_of_micro_batch_means_would_be_another_number(micro_batch):
    llava, _, _ = set_up("lora")
    model, _ = references.doubled(llava.model)
    pools = references.pools(COUNTS)
    samples = [pools[slot.domain].sample(slot.index) for slot in SLOTS]
    losses = [references.taught(model, llava.processor, sample)[0] for sample in samples]
    every = [float(one.detach()) for of_sample in losses for one in of_sample]
    chunks = [losses[i : i + micro_batch] for i in range(0, len(losses), micro_batch)]
    means = []
    for chunk in chunks:
        tokens = [float(one.detach()) for of_sample in chunk for one in of_sample]
        means.append(sum(tokens) / len(tokens))
    wanted = sum(every) / len(every)
    assert abs(sum(means) / len(means) - wanted) > 1e-2 * wanted


def test_shares_are_counted_over_samples_and_supervised_tokens(tmp_path):
    _, _, outcome = looped("lora", 4, tmp_path)
    llava, _, _ = set_up("lora")
    pools = references.pools(COUNTS)
    tokens = {
        domain: sum(len(references.target(llava.processor, item)) for item in pools[domain].items)
        for domain in COUNTS
    }
    assert outcome.sample_shares == pytest.approx({d: n / len(SLOTS) for d, n in COUNTS.items()})
    assert outcome.token_shares == pytest.approx({d: n / sum(tokens.values()) for d, n in tokens.items()})


class Listener:
    """Stands for a method: notes what it is told of every batch, and takes its statistics where that counts."""

    def __init__(self, attached, trace):
        self.told, self.sums = [], []
        self.attached = replace(attached, losses=self.losses, after_step=self.after_step)
        self.trace = trace

    def losses(self, trace):
        assert trace is self.trace
        self.told.append(
            (trace.questions, trace.tasks, trace.prompt_lengths, trace.counted, trace.token_mask_BT.shape)
        )
        return {}

    def after_step(self, reduce):
        part = torch.tensor([3, 4])
        assert reduce(part).tolist() == [3, 4]
        self.sums.append(len(self.told))


def test_the_method_is_told_of_every_row_and_called_after_every_step(tmp_path, monkeypatch):
    """The second of two workers has nothing but a sample that does not count in the last step."""
    llava, trace, attached = set_up("lora")
    listener = Listener(attached, trace)
    config = small("lora", optim={"global_batch": 4}, execution={"micro_batch": 2})
    pools = references.pools(COUNTS)
    slots = [*SLOTS[:4], SLOTS[4]]
    trained = engine.Engine(llava.model, config.optim, config.execution, projector_weights(llava.model))
    try:
        loop = Loop(config, llava, listener.attached, trace, trained, pools, slots)
        whole = [[pools[s.domain].sample(s.index) for s in slots[i : i + 2]] for i in (0, 2, 4)]
        loop.run(tmp_path, lambda metrics: None)
        assert listener.sums == [2, 3]
        for samples, (questions, tasks, lengths, counted, shape) in zip(whole, listener.told, strict=True):
            assert questions == tuple(s.question for s in samples)
            assert tasks == tuple(s.domain for s in samples)
            assert lengths == tuple(references.prompt(llava.processor, s)[0].shape[1] for s in samples)
            assert counted
            assert len(samples) == shape[0]
        monkeypatch.setattr(engine, "world_size", lambda: 2)
        monkeypatch.setattr(engine, "rank", lambda: 1)
        (batch,) = loop.batches.of(1)
    finally:
        trained.close()
    batch.begin(trace)
    assert (trace.counted, trace.tasks, trace.questions) == (False, tasks, questions)
    assert trace.prompt_lengths == lengths
    assert len(batch.samples) == 0
