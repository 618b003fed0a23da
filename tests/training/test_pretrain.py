"""The base's training: each weight has one optimizer, conventions are never told, and a few steps learn something."""

import torch

from workloads.data.pocket import DOMAINS, QUESTIONS, compose
from workloads.data.pocket.questions import detail
from workloads.training.pretrain import TURNS, Recipe, batches, new_llava, optimizers, sample, train


def test_each_weight_is_trained_by_exactly_one_optimizer_and_tables_never_by_muon():
    model = new_llava(Recipe()).model
    muon, adam = optimizers(Recipe(), model)
    held = [w for o in (muon, adam) for group in o.param_groups for w in group["params"]]
    assert sorted(map(id, held)) == sorted(id(w) for w in model.parameters())
    names = {id(w): name for name, w in model.named_parameters()}
    for w in (w for group in muon.param_groups for w in group["params"]):
        assert w.dim() == 2
        assert "embed" not in names[id(w)]


def test_the_base_s_training_never_answers_in_a_domain_s_own_convention_of_counts_places_and_sides():
    assert set(TURNS) == set(DOMAINS)
    for domain in DOMAINS:
        shown = [
            sample(domain, 1000, i, "train", Recipe(), asks) for i in range(80) for asks in (False, True)
        ]
        assert {"describe", "list"} <= {s.question for s in shown}
        assert QUESTIONS["side"] not in {s.question for s in shown}
        asked = {s.question for s in shown} & set(QUESTIONS.values())
        assert {QUESTIONS["name"], QUESTIONS["count"], QUESTIONS["where"]} <= asked
        for k, given in enumerate(shown):
            if given.question in (QUESTIONS["count"], QUESTIONS["where"]):
                own = {p.question: p.answer for p in compose(domain, "train", 1000, k // 2).qa}
                assert given.answer != own.get(given.question), given


def test_a_listed_word_names_every_letter_with_the_column_its_ink_is_in():
    scenes = [compose("document", "train", 3, i) for i in range(60)]
    words = [scene for scene in scenes if scene.facts.layout == "word"]
    assert len(words) >= 10
    for scene in words:
        (part,) = scene.facts.parts
        listed = detail(scene.facts).split()
        assert "".join(listed[::3]) == part.label
        paper = scene.image[part.box[1] : part.box[3]].max()
        ink_W = (scene.image[part.box[1] : part.box[3]].mean(axis=(0, 2)) < paper - 12).nonzero()[0]
        for k, column_code in enumerate(listed[2::3]):
            # Letters stand in cells of 24 px; the grid of places has 5 columns over 96 px.
            left = part.box[0] + 24 * k
            assert any(left <= x < left + 24 for x in ink_W)
            assert column_code == f"q{min(4, (left + 12) * 5 // 96) + 1}"


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    short = {"batch": 8, "threads": 1, "question_steps": 0}
    first = train(Recipe(num_steps=1, **short), new_llava(Recipe()))
    later = train(Recipe(num_steps=25, report_every=5, probe_every=100, **short), new_llava(Recipe()))
    assert later < first - 0.5


def test_the_second_part_asks_the_benchmark_s_questions_and_repeats_no_sample_of_the_first():
    recipe = Recipe(num_steps=6, question_steps=4, batch=10)
    parts = [[s for batch in batches(recipe, asks) for s in batch] for asks in (False, True)]
    assert [len(part) for part in parts] == [60, 40]
    assert not {s.id for s in parts[0]} & {s.id for s in parts[1]}
    asked = [sum(s.question in QUESTIONS.values() for s in part) for part in parts]
    assert asked[0] == 0
    assert 10 <= asked[1] <= 36
