"""Spaces and searches become the Ray Tune objects that their words say."""

import random

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from orchestrator.schedulers import sampled, scheduler
from orchestrator.spaces import WORDS, read_space
from orchestrator.study import Search


@pytest.mark.parametrize("word", sorted(WORDS))
def test_every_word_draws_inside_its_range(word):
    bounds = [2, 64] if WORDS[word] == 2 else [2, 64, 2]
    domain = sampled(read_space({"optim.lr": {word: bounds}}, "space"))["optim.lr"]
    drawn = domain.sample(size=200)
    assert min(drawn) >= 2
    assert max(drawn) <= 64
    assert len(set(drawn)) > 10
    if word.startswith("q"):
        assert all(value % 2 == 0 for value in drawn)


def test_choice_draws_only_what_it_lists():
    random.seed(0)
    domain = sampled(read_space({"adapter.rank": {"choice": [1, 4]}}, "space"))["adapter.rank"]
    assert set(domain.sample(size=50)) == {1, 4}


def test_a_study_without_a_scheduler_stops_nothing():
    space = {"optim.lr": {"uniform": [1, 2]}}
    assert type(scheduler(None, 10)) is FIFOScheduler
    assert type(scheduler(Search(space=space), 10)) is FIFOScheduler


def test_successive_halving_never_cuts_a_run_that_leads():
    space = {"optim.lr": {"uniform": [1, 2]}}
    made = scheduler(Search(space=space, scheduler="asha", metric="loss", mode="min"), 40)
    assert isinstance(made, ASHAScheduler)
    # Its limit lies past the last step, so that evaluation after that step still happens.
    assert made._max_t > 40
