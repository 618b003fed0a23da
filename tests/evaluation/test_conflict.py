"""Conflict metrics: their definitions, and that pairing is by seed and item id."""

import numpy as np
import pytest

from workloads.evaluation import conflict
from workloads.evaluation.conflict import ItemScores, Roles, breakdown, find, paired, select_seeds
from workloads.evaluation.statistics import interval

DOMAINS = ("general", "document")
ROLES = Roles(
    solo={"general": "solo_general", "document": "solo_document"},
    mix="lora_mix",
    double="lora_mix_2n",
    iso="lora_mix_iso",
    mole=("mole_hard", "mole_scaled"),
    headline="mole_hard",
)
ARMS = (*ROLES.solo.values(), ROLES.mix, ROLES.double, ROLES.iso, *ROLES.mole)


def scores_of(rng, domain, seeds=(0, 1, 2, 3, 4), num_items=24):
    return ItemScores(
        seeds=tuple(seeds),
        ids=tuple(f"{domain}-{i}" for i in range(num_items)),
        question_types=tuple(("name", "count", domain)[i % 3] for i in range(num_items)),
        scores_SI=(rng.uniform(size=(len(seeds), num_items)) < 0.6).astype(float),
    )


def contrasts(scores, roles):
    """With every arm trained on all domains."""
    return conflict.contrasts(scores, roles, dict.fromkeys(scores, DOMAINS))


@pytest.fixture
def scores():
    rng = np.random.default_rng(8)
    return {arm: {domain: scores_of(rng, domain) for domain in DOMAINS} for arm in ARMS}


def mean_by_hand(items, question_type=None):
    total, count = 0.0, 0
    for row in items.scores_SI.tolist():
        for name, value in zip(items.question_types, row, strict=True):
            if question_type in (None, name):
                total, count = total + value, count + 1
    return total / count


@pytest.mark.parametrize(
    ("metric", "arm", "reference"),
    [
        ("recovery", "mole_hard", "lora_mix"),
        ("recovery", "mole_scaled", "lora_mix"),
        ("double", "mole_hard", "lora_mix_2n"),
        ("iso", "mole_scaled", "lora_mix_iso"),
    ],
)
def test_a_metric_is_the_difference_of_two_arms(scores, metric, arm, reference):
    found = find(contrasts(scores, ROLES), metric, arm)
    assert found.against == reference
    expected = {d: mean_by_hand(scores[arm][d]) - mean_by_hand(scores[reference][d]) for d in DOMAINS}
    assert {d: found.difference.by_domain[d].mean for d in DOMAINS} == pytest.approx(expected, abs=1e-12)
    assert found.difference.mean.mean == pytest.approx(sum(expected.values()) / 2, abs=1e-12)
    assert found.difference.seeds_only.mean == pytest.approx(found.difference.mean.mean, abs=1e-12)


def test_the_gap_is_against_each_domains_own_solo_arm(scores):
    found = contrasts(scores, ROLES)
    assert [c.arm for c in found if c.metric == "gap"] == [arm for arm in ARMS if not arm.startswith("solo")]
    gap = find(found, "gap", "lora_mix")
    for domain in DOMAINS:
        expected = mean_by_hand(scores["lora_mix"][domain]) - mean_by_hand(scores[f"solo_{domain}"][domain])
        assert gap.difference.by_domain[domain].mean == pytest.approx(expected, abs=1e-12)


def test_question_types_are_split_per_domain_and_averaged_over_the_domains_that_ask_them(scores):
    found = find(contrasts(scores, ROLES), "double", "mole_hard").difference
    assert set(found.by_type) == {"name", "count", "general", "document"}
    assert set(found.by_type["document"]) == {"document"}
    by_domain = {}
    for domain in DOMAINS:
        by_domain[domain] = mean_by_hand(scores["mole_hard"][domain], "name") - mean_by_hand(
            scores["lora_mix_2n"][domain], "name"
        )
        assert found.by_type["name"][domain].mean == pytest.approx(by_domain[domain], abs=1e-12)
        assert found.by_type["name"][domain].num_items == 8
    assert found.type_mean["name"].mean == pytest.approx(sum(by_domain.values()) / 2, abs=1e-12)


def test_items_are_paired_by_id_and_seeds_by_seed_whatever_their_order(scores):
    left, right = scores["mole_hard"], scores["lora_mix"]
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(5), rng.permutation(24)
    shuffled = {
        domain: ItemScores(
            seeds=tuple(items.seeds[r] for r in rows),
            ids=tuple(items.ids[c] for c in columns),
            question_types=tuple(items.question_types[c] for c in columns),
            scores_SI=items.scores_SI[rows][:, columns],
        )
        for domain, items in right.items()
    }
    straight, turned = paired(left, right), paired(left, shuffled)
    for domain in DOMAINS:
        assert np.array_equal(straight[domain].scores_SI, turned[domain].scores_SI)
        assert turned[domain].ids == left[domain].ids


def test_pairing_removes_what_two_arms_share():
    rng = np.random.default_rng(9)
    difficulty = rng.normal(0, 1, (1, 200)) + rng.normal(0, 0.5, (6, 1))
    make = lambda shift: {  # noqa: E731
        "general": ItemScores(
            seeds=tuple(range(6)),
            ids=tuple(map(str, range(200))),
            question_types=("name",) * 200,
            scores_SI=difficulty + shift + rng.normal(0, 0.1, (6, 200)),
        )
    }
    one, other = make(0.1), make(0.0)
    difference = breakdown(paired(one, other)).mean
    assert 0.05 < difference.low < 0.1 < difference.high < 0.15
    assert interval(one["general"].scores_SI).half_width > 10 * difference.half_width


def test_a_missing_seed_is_named(scores):
    fewer = select_seeds(scores["lora_mix"], (0, 1, 2, 4))
    with pytest.raises(ValueError, match=r"general: seeds differ: only left 3; only right none"):
        paired(scores["mole_hard"], fewer)
    with pytest.raises(ValueError, match="no scores for seeds 3"):
        select_seeds(fewer, (3,))


def test_a_missing_item_is_named_with_the_metric_and_the_arms(scores):
    whole = scores["lora_mix_2n"]["document"]
    scores["lora_mix_2n"] = dict(scores["lora_mix_2n"]) | {
        "document": ItemScores(
            seeds=whole.seeds,
            ids=(*whole.ids[:-1], "elsewhere"),
            question_types=whole.question_types,
            scores_SI=whole.scores_SI,
        )
    }
    message = "gap of lora_mix_2n against solo: document: items differ: only left elsewhere; only right .*-23"
    with pytest.raises(ValueError, match=message):
        contrasts(scores, ROLES)


def test_an_item_given_twice_is_named(scores):
    whole = scores["lora_mix"]["general"]
    twice = ItemScores(
        seeds=whole.seeds,
        ids=("general-1", *whole.ids[1:]),
        question_types=whole.question_types,
        scores_SI=whole.scores_SI,
    )
    with pytest.raises(ValueError, match="general: items given twice: general-1"):
        paired({"general": twice}, {"general": twice})


def test_an_item_with_two_question_types_is_named(scores):
    whole = scores["lora_mix"]["general"]
    changed = ItemScores(
        seeds=whole.seeds,
        ids=whole.ids,
        question_types=("other", *whole.question_types[1:]),
        scores_SI=whole.scores_SI,
    )
    with pytest.raises(ValueError, match="two question types: general-0"):
        paired({"general": whole}, {"general": changed})


def test_a_domain_that_one_arm_lacks_is_named(scores):
    with pytest.raises(ValueError, match="domains differ: only left document"):
        paired(scores["mole_hard"], {"general": scores["lora_mix"]["general"]})


def test_unfinished_arms_are_compared_over_the_seeds_both_have_and_the_rest_is_listed(scores):
    scores["lora_mix_2n"] = select_seeds(scores["lora_mix_2n"], (4, 0, 2))
    found = contrasts(scores, ROLES)
    double = find(found, "double", "mole_hard")
    assert double.seeds_left_out == (1, 3)
    assert double.difference.mean.num_seeds == 3
    means = {d: scores["mole_hard"][d].scores_SI[[0, 2, 4]].mean() for d in DOMAINS}
    expected = np.mean([means[d] - scores["lora_mix_2n"][d].scores_SI.mean() for d in DOMAINS])
    assert double.difference.mean.mean == pytest.approx(expected, abs=1e-12)
    assert find(found, "recovery", "mole_hard").seeds_left_out == ()


def test_what_cannot_be_compared_yet_is_left_out(scores):
    del scores["lora_mix_2n"], scores["solo_document"], scores["mole_scaled"]
    found = contrasts(scores, ROLES)
    assert {(c.metric, c.arm) for c in found} == {("recovery", "mole_hard"), ("iso", "mole_hard")}
    scores["lora_mix"] = select_seeds(scores["lora_mix"], (0, 1))
    scores["mole_hard"] = select_seeds(scores["mole_hard"], (2, 3))
    assert find(contrasts(scores, ROLES), "recovery", "mole_hard") is None
    assert contrasts(scores, Roles()) == ()


def test_a_domain_without_a_solo_arm_has_no_gap(scores):
    roles = Roles(solo={"general": "solo_general"}, mix="lora_mix")
    gap = find(contrasts(scores, roles), "gap", "lora_mix")
    assert set(gap.difference.by_domain) == {"general"}


def test_a_domain_that_an_arm_does_not_train_on_has_no_gap_but_counts_elsewhere(scores):
    trained_on = dict.fromkeys(scores, DOMAINS) | {"mole_hard": ["document"], "mole_scaled": []}
    found = conflict.contrasts(scores, ROLES, trained_on)
    assert set(find(found, "gap", "mole_hard").difference.by_domain) == {"document"}
    assert find(found, "gap", "mole_scaled") is None
    assert set(find(found, "double", "mole_hard").difference.by_domain) == set(DOMAINS)


def test_solo_arms_may_be_scored_on_their_own_domain_only(scores):
    for domain in DOMAINS:
        scores[f"solo_{domain}"] = {domain: scores[f"solo_{domain}"][domain]}
    assert set(find(contrasts(scores, ROLES), "gap", "lora_mix").difference.by_domain) == set(DOMAINS)


def test_inputs_are_never_changed(scores):
    before = {arm: {d: items.scores_SI.copy() for d, items in by.items()} for arm, by in scores.items()}
    for by in scores.values():
        for items in by.values():
            items.scores_SI.setflags(write=False)
    contrasts(scores, ROLES)
    for arm, by in scores.items():
        assert list(by) == list(DOMAINS)
        for domain, items in by.items():
            assert np.array_equal(items.scores_SI, before[arm][domain])


def test_domains_of_one_arm_share_its_seeds(scores):
    uneven = {"general": scores["lora_mix"]["general"]} | {
        "document": select_seeds(scores["lora_mix"], (0, 1))["document"]
    }
    with pytest.raises(ValueError, match="different seeds"):
        breakdown(uneven)
