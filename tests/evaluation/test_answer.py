"""Answers in batches are the answers one at a time: same texts, same losses, same experts."""

import copy
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from tests import references
from tests.training.runs import small
from workloads import adapters
from workloads.adapters.base import Trace
from workloads.evaluation import answer as answer_module
from workloads.evaluation.answer import answer
from workloads.llava.build import Llava, build
from workloads.training import engine

COUNTS = {"general": 3, "document": 4, "biomedical": 2}
BATCHES = (1, 2, 4, 9)


@pytest.fixture(scope="module")
def setting():
    """A trained base with a random adapter, its trace, and pools of prompts of different lengths."""
    engine.join()
    config = small("mole", adapter_fields={"router_grad": "scaled"})
    llava, trace = build(config.model, "fp32"), Trace()
    torch.manual_seed(0)
    adapters.attach(llava.model, config.adapter, trace)
    trace.watch(llava.model)
    with torch.no_grad():
        for name, weight in llava.model.named_parameters():
            if "experts_B" in name or "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * 0.02)
    return llava, trace, references.pools(COUNTS)


@pytest.fixture(scope="module")
def alone(setting):
    """What a float64 model says to every item on its own: texts, loss and share of tokens on experts by domain."""
    llava, _, pools = setting
    model, listener = references.doubled(llava.model)
    texts, losses, shares = {}, {}, {}
    with torch.no_grad():
        for domain, count in COUNTS.items():
            domain_losses, tokens = [], defaultdict(lambda: defaultdict(int))
            for i in range(count):
                item = pools[domain].sample(i)
                texts[item.id] = references.greedy(model, llava.processor, item, 8)
                listener.take()
                domain_losses += references.taught(model, llava.processor, item)[0]
                for layer, scores_TE in enumerate(listener.take()):
                    for row_E in scores_TE:
                        tokens[layer][int(row_E.argmax())] += 1
            losses[domain] = float(sum(domain_losses) / len(domain_losses))
            shares[domain] = [
                [tokens[layer][e] / sum(tokens[layer].values()) for e in range(3)] for layer in sorted(tokens)
            ]
    return texts, losses, shares


def answered(setting, batch, folder=None):
    llava, trace, pools = setting
    config = small("mole", execution={"eval_batch": batch})
    items = {domain: range(count) for domain, count in COUNTS.items()}
    return answer(config, llava, trace, pools, items, folder)


def test_the_prompts_have_different_lengths(setting):
    llava, _, pools = setting
    items = [pools[domain].sample(i) for domain in COUNTS for i in range(COUNTS[domain])]
    assert len({references.prompt(llava.processor, item)[0].shape[1] for item in items}) > 2


@pytest.mark.parametrize("batch", BATCHES)
def test_batched_answers_are_those_of_each_item_alone(batch, setting, alone):
    texts, losses, shares = alone
    result = answered(setting, batch)
    assert {row["id"]: row["raw"] for row in result.predictions} == texts
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for domain, layers in shares.items():
        for ours, wanted in zip(result.routing[domain], layers, strict=True):
            assert ours == pytest.approx(wanted, abs=1e-9)


def test_the_answers_are_not_all_the_same(alone):
    texts, _, _ = alone
    assert len(set(texts.values())) > 2


def test_predictions_stand_in_the_order_of_domains_and_items(setting):
    wanted = [f"{domain}-{i}" for domain in sorted(COUNTS) for i in range(COUNTS[domain])]
    assert [row["id"] for row in answered(setting, 4).predictions] == wanted


def test_a_prediction_repeats_the_item_it_answers(setting):
    _, _, pools = setting
    for row in answered(setting, 9).predictions:
        domain, index = row["id"].split("-")
        item = pools[domain].sample(int(index))
        assert (row["prompt"], row["answer"], row["domain"]) == (item.question, item.answer, domain)
        assert row["score"] == float(row["raw"].split() == item.answer.split() != [])


def test_answering_changes_no_weight(setting):
    llava, _, _ = setting
    assert isinstance(llava, Llava)
    before = copy.deepcopy(llava.model.state_dict())
    answered(setting, 4)
    assert all(torch.equal(before[name], weight) for name, weight in llava.model.state_dict().items())


def test_the_method_is_told_of_every_row_before_answering_and_before_teaching(setting, monkeypatch):
    llava, trace, pools = setting
    told = []
    monkeypatch.setattr(trace, "begin", lambda *given, **named: told.append((*given, named)))
    config = small("mole", execution={"eval_batch": 4}, eval={"max_new_tokens": 1})
    answer(config, llava, trace, pools, {domain: list(range(count)) for domain, count in COUNTS.items()})
    items = [pools[domain].sample(i) for domain in sorted(COUNTS) for i in range(COUNTS[domain])]
    batches = [items[i : i + 4] for i in range(0, len(items), 4) for _ in ("answered", "taught")]
    for batch, (questions, tasks, lengths, named) in zip(batches, told, strict=True):
        assert questions == [item.question for item in batch]
        assert tasks == [item.domain for item in batch]
        assert lengths == tuple(references.prompt(llava.processor, item)[0].shape[1] for item in batch)
        assert named == {"counted": True}


class Stopped(Exception):
    """The worker is gone."""


def stopped_after(monkeypatch, num_batches):
    """Let `answer` come to an end when it has generated that often."""
    generate, calls = answer_module._generate, []

    def counted(*given):
        if len(calls) == num_batches:
            raise Stopped
        calls.append(len(given[-1]))
        return generate(*given)

    monkeypatch.setattr(answer_module, "_generate", counted)
    return calls


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_answering_goes_on_where_it_was_killed_with_the_same_numbers_to_the_bit(
    batch, torn, setting, tmp_path, monkeypatch
):
    whole = answered(setting, batch)
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Stopped):
            answered(setting, batch, tmp_path)
    (kept,) = tmp_path.iterdir()
    if torn:
        kept.write_bytes(kept.read_bytes()[:-9])
    with monkeypatch.context() as patch:
        calls = stopped_after(patch, 99)
        again = answered(setting, batch, tmp_path)
    assert sum(calls) == sum(COUNTS.values()) - batch * (1 if torn else 2)
    assert replace(again, seconds=0) == replace(whole, seconds=0)
    with monkeypatch.context() as patch:
        stopped_after(patch, 0)
        assert replace(answered(setting, batch, tmp_path), seconds=0) == replace(whole, seconds=0)


def test_batches_of_another_size_are_not_gone_on_with(setting, tmp_path):
    answered(setting, 4, tmp_path)
    result = answered(setting, 2, tmp_path)
    assert replace(result, seconds=0) == replace(answered(setting, 2), seconds=0)


class Fleeting:
    """A pool that decodes a new sample each time, and counts those that somebody still holds."""

    def __init__(self, items, held):
        self.items, self.held = items, held

    def sample(self, index):
        item = replace(self.items.sample(index))
        self.held["now"] += 1
        self.held["most"] = max(self.held["most"], self.held["now"])
        weakref.finalize(item, lambda: self.held.update(now=self.held["now"] - 1))
        return item


def test_no_more_samples_are_held_than_two_batches(setting):
    llava, trace, _ = setting
    counts, held = dict.fromkeys(COUNTS, 10), {"now": 0, "most": 0}
    pools = {domain: Fleeting(items, held) for domain, items in references.pools(counts).items()}
    config = small("mole", execution={"eval_batch": 2}, eval={"max_new_tokens": 1})
    answer(config, llava, trace, pools, {domain: range(10) for domain in COUNTS})
    assert 2 <= held["most"] <= 4
