"""Stages and orders of a stream: permutations that follow from words and seeds, and mistakes in one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.orders import read, sampled
from workloads.errors import UserError

NAMES = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=5, unique=True).map(tuple)


@given(NAMES, st.integers(0, 5), st.data())
def test_sampled_orders_are_different_permutations_and_more_begin_with_the_same(names, seed, data):
    possible = math.factorial(len(names))
    number = data.draw(st.integers(1, min(possible, 30)))
    orders = sampled(names, number, seed)
    assert len(set(orders)) == len(orders) == number
    assert all(sorted(order) == sorted(names) for order in orders)
    more = sampled(names, min(possible, number + 2), seed)
    left = possible - len({names, names[::-1]})
    assert more[: min(number, left)] == orders[: min(number, left)]
    assert not {names, names[::-1]} & set(orders[:left])


def test_every_permutation_can_be_drawn_and_seeds_differ():
    names = ("a", "b", "c", "d")
    assert len(set(sampled(names, 24, 0))) == 24
    assert sampled(names, 3, 0) != sampled(names, 3, 1)


def test_sampled_orders_are_about_uniform():
    counts: dict[tuple[str, ...], int] = {}
    for seed in range(1200):
        for order in sampled(("a", "b", "c"), 1, seed):
            counts[order] = counts.get(order, 0) + 1
    # The order given and its reverse are left to those who name them; four orders stay, 300 draws each.
    assert len(counts) == 4
    assert all(abs(count - 300) < 75 for count in counts.values())


def test_orders_are_labelled_by_their_words():
    mixed = {"name": "m", "mixture": {"a": 1, "c": 0.5}}
    orders = ["given", "reversed", {"sampled": 2, "seed": 3}, ["b", "a", "m"]]
    stream = read({"stages": ["a", "b", mixed], "orders": orders})
    assert list(stream.orders) == ["given", "reversed", "sampled-0", "sampled-1", "explicit-0"]
    assert stream.orders["given"] == ("a", "b", "m")
    assert stream.orders["reversed"] == ("m", "b", "a")
    assert stream.orders["explicit-0"] == ("b", "a", "m")
    assert stream.stage("a").mixture == {"a": 1.0}
    assert stream.stage("m").mixture == {"a": 1.0, "c": 0.5}


def test_all_orders_come_once_and_are_labelled_by_their_place():
    stream = read({"stages": ["a", "b", "c"], "orders": ["reversed", {"all": 24}]})
    assert len(stream.orders) == 6
    assert len(set(stream.orders.values())) == 6
    assert stream.orders["all-0"] == ("a", "b", "c")
    assert "all-5" not in stream.orders
    limited = read({"stages": ["a", "b", "c"], "orders": [{"all": 4}]})
    assert len(set(limited.orders.values())) == 4


def test_a_stream_without_orders_runs_in_the_one_given():
    assert read({"stages": ["a", "b"]}).orders == {"given": ("a", "b")}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"stages": []}, ("stream.stages", "at least one")),
        ({"stages": "a"}, ("stream.stages", "'a'")),
        ({"stages": ["a", "a"]}, ("stream.stages", "'a'", "each stage once")),
        ({"stages": ["a", {"name": "a", "mixture": {"b": 1}}]}, ("stream.stages", "'a'", "once")),
        ({"stages": [{"name": "m"}]}, ("stream.stages.m.mixture", "None")),
        ({"stages": [{"name": "m", "mixture": {"a": "x"}}]}, ("stream.stages.m.mixture", "weights")),
        ({"stages": [{"name": "m", "mixture": "all_equl"}]}, ("mixture", "did you mean 'all_equal'")),
        ({"stages": [{"nme": "m", "mixture": {"a": 1}}]}, ("stream.stages.nme", "did you mean 'name'")),
        ({"stages": [{"name": "a b", "mixture": {"a": 1}}]}, ("stream.stages.name", "'a b'")),
        ({"stages": [3]}, ("stream.stages", "3")),
        ({"stags": ["a"]}, ("stream.stags", "did you mean 'stages'")),
        ({"stages": ["a", "b"], "orders": []}, ("stream.orders", "[]")),
        ({"stages": ["a", "b"], "orders": ["given", "given"]}, ("stream.orders", "already, as given")),
        ({"stages": ["a", "b"], "orders": ["revesed"]}, ("stream.orders", "did you mean 'reversed'")),
        ({"stages": ["a", "b"], "orders": [["a"]]}, ("stream.orders", "['a']", "each of a, b once")),
        ({"stages": ["a", "b"], "orders": [["a", "b", "a"]]}, ("stream.orders", "each of a, b once")),
        ({"stages": ["axis", "b"], "orders": [["axs", "b"]]}, ("'axs'", "did you mean 'axis'")),
        ({"stages": ["a", "b"], "orders": [[1, 2]]}, ("stream.orders", "1 in [1, 2] is no stage")),
        ({"stages": ["a", "b"], "orders": [["a", ["b"]]]}, ("stream.orders", "is no stage")),
        ({"stages": ["a", "b"], "orders": [{"sampled": 3}]}, ("stream.orders.sampled", "3", "2 stages have 2")),
        ({"stages": ["a", "b"], "orders": [{"sampled": 0}]}, ("stream.orders.sampled", "0")),
        ({"stages": ["a", "b"], "orders": [{"sampled": 1, "sed": 1}]}, ("sed", "did you mean 'seed'")),
        ({"stages": ["a", "b"], "orders": [{"sampled": True}]}, ("stream.orders.sampled", "True")),
        ({"stages": ["a", "b"], "orders": [{"al": 1}]}, ("stream.orders", "{'al': 1}")),
        ({"stages": ["a", "b"], "orders": [{"all": -1}]}, ("stream.orders.all", "-1")),
        ([], ("stream", "[]", "a mapping")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(tree, words):
    with pytest.raises(UserError) as caught:
        read(tree)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
