"""Answers of the embedded benchmark agree with facts recomputed from pixels, tables and raw voxels."""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from workloads.data.pocket import DOMAINS, QUESTION_TYPES, SPLITS, compose, neutral_qa, vocabulary
from workloads.data.pocket.questions import ask, known_qa

ASSETS = Path(__file__).parents[2] / "workloads" / "assets"
TINTS = {
    "red": (235, 50, 45),
    "yellow": (250, 225, 50),
    "green": (60, 190, 70),
    "blue": (70, 120, 250),
    "purple": (170, 75, 215),
    "white": (250, 250, 250),
}


@functools.cache
def scenes(domain):
    return [compose(domain, split, 5, index) for split in SPLITS for index in range(120)]


def every_scene():
    return [scene for domain in DOMAINS for scene in scenes(domain)]


def answers(scene):
    return {pair.question_type: pair.answer for pair in scene.qa}


def mark_centres(scene):
    """(x, y) of every mark, found by its colours in the picture."""
    image = scene.image.astype(int)
    magenta = (image == (255, 0, 255)).all(2)
    yellow = (image == (255, 255, 0)).all(2)
    labels, count = ndimage.label(magenta | yellow, structure=np.ones((3, 3)))
    centres = ndimage.center_of_mass(np.ones(labels.shape), labels, range(1, count + 1))
    return [(x, y) for y, x in centres]


def test_every_picture_answers_what_it_was_drawn_for_and_nothing_twice():
    for scene in every_scene():
        types = [pair.question_type for pair in scene.qa]
        assert scene.focus in types
        assert len(types) == len(set(types))
        assert scene.image.shape == (96, 96, 3)
        assert scene.image.dtype == np.uint8


@pytest.mark.parametrize("domain", DOMAINS)
def test_question_types_come_in_equal_shares(domain):
    count = len(QUESTION_TYPES[domain])
    shares = Counter(compose(domain, "val", 9, index).focus for index in range(4 * count))
    assert shares == dict.fromkeys(QUESTION_TYPES[domain], 4)


def test_a_question_reads_the_same_in_every_domain():
    wordings, homes = {}, {}
    for scene in every_scene():
        for pair in scene.qa:
            wordings.setdefault(pair.question_type, set()).add(pair.question)
            homes.setdefault(pair.question, set()).add(scene.facts.domain)
    assert all(len(texts) == 1 for texts in wordings.values())
    shared = [question for question, domains in homes.items() if domains == set(DOMAINS)]
    assert len(shared) == 5
    assert sorted(question for question in homes if question not in shared) == [
        "what is the total ?",
        "which one is the largest ?",
    ]


def test_every_word_is_in_the_vocabulary_or_is_capitals_or_a_number():
    known = set(vocabulary())
    for scene in every_scene():
        pairs = scene.qa + neutral_qa(scene) + known_qa(scene)
        for text in [scene.caption] + [t for pair in pairs for t in (pair.question, pair.answer)]:
            assert text == " ".join(text.split())
            for word in text.split(" "):
                spelled = word.isascii() and (word.isdigit() or (word.isalpha() and word.isupper()))
                assert spelled or word in known, (word, text)
                assert word in known or len(word) <= 5
        for pair in pairs:
            assert len(pair.answer.split()) <= 3


def test_the_neutral_language_never_tells_a_domains_answer_words():
    for scene in every_scene():
        if scene.facts.domain == "document":
            continue
        told = {word for pair in neutral_qa(scene) for word in pair.answer.split()}
        told |= set(scene.caption.split())
        assert not told & {word for pair in scene.qa for word in pair.answer.split()}


def test_the_base_is_told_the_words_for_things_and_no_domain_s_wording_of_counts_places_and_sides():
    told, wordings = set(), set()
    for scene in every_scene():
        own = answers(scene)
        for pair in known_qa(scene):
            assert pair.question_type != "side"
            told |= set(pair.answer.split())
            if pair.question_type in ("count", "where"):
                assert pair.answer != own.get(pair.question_type)
            else:
                assert pair.answer == own.get(pair.question_type, pair.answer)
        if scene.facts.domain != "document":
            conventions = [own[kind] for kind in ("count", "where", "side") if kind in own]
            wordings |= {word for text in conventions for word in text.split()}
    # Six counts and ten places; fifteen anatomical terms of direction and six numerals; left and right in both.
    assert len(wordings) == 6 + 10 + 15 + 6
    assert not told & wordings


def test_place_and_side_follow_the_mark_seen_in_the_picture():
    rows = ("top", "upper", "middle", "lower", "bottom")
    columns = ("leftmost", "left", "centre", "right", "rightmost")
    seen = Counter()
    for domain in ("general", "document"):
        for scene in scenes(domain):
            got = answers(scene)
            if "where" in got or "side" in got:
                ((x, y),) = mark_centres(scene)
            if "where" in got:
                cell = int((y + 0.5) // 19.2), int((x + 0.5) // 19.2)
                worded = {
                    "general": f"{rows[cell[0]]} {columns[cell[1]]}",
                    "document": f"{cell[0] + 1} {cell[1] + 1}",
                }
                assert got["where"] == worded[domain]
                seen[domain, "where"] += 1
            if "side" in got:
                assert abs(x + 0.5 - 48) >= 8
                right = int(x + 0.5 > 48)
                assert got["side"] == {"general": ("left", "right"), "document": ("l", "r")}[domain][right]
                seen[domain, "side"] += 1
    assert min(seen.values()) >= 50
    assert len(seen) == 4


def test_a_photographs_count_is_the_number_of_items_and_no_mark_disturbs_it():
    words = ("one", "two", "three", "four", "five", "six")
    counted = [scene for scene in scenes("general") if "count" in answers(scene)]
    assert len(counted) >= 60
    for scene in counted:
        assert mark_centres(scene) == []
        assert answers(scene)["count"] == words[len(scene.sources) - 1]
        boxes = [part.box for part in scene.facts.parts]
        assert len(boxes) == len(scene.sources)
        covered = np.zeros((96, 96), int)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 96
            assert 0 <= top < bottom <= 96
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1, "items do not hide each other"


def test_the_colour_at_the_mark_is_the_colour_of_the_pixels_in_its_open_middle():
    marked = [scene for scene in scenes("general") if "at_mark" in answers(scene)]
    assert len(marked) >= 50
    for scene in marked:
        x, y = scene.facts.mark.x, scene.facts.mark.y
        seen = scene.image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).astype(float).mean(0)

        def likeness(name, seen=seen):
            tint = np.array(TINTS[name], float)
            return float(seen @ tint / np.linalg.norm(seen) / np.linalg.norm(tint))

        assert max(TINTS, key=likeness) == answers(scene)["at_mark"]


def test_the_largest_item_is_larger_by_half_and_of_another_kind():
    pairs = [scene for scene in scenes("general") if "largest" in answers(scene)]
    assert len(pairs) >= 50
    for scene in pairs:
        sides = {part.label: part.box[2] - part.box[0] for part in scene.facts.parts}
        assert len(sides) == 2
        small, big = sorted(sides.values())
        assert big >= 1.5 * small
        assert sides[answers(scene)["largest"]] == big


def test_a_receipts_total_is_the_sum_of_its_lines():
    receipts = [scene for scene in scenes("document") if scene.facts.layout == "receipt"]
    assert len(receipts) >= 50
    for scene in receipts:
        lines = [part.value for part in scene.facts.parts]
        assert answers(scene)["total"] == f"{sum(lines):.0f}"
        assert answers(scene)["count"] == str(len(lines))
        assert [f"word:{part.label}" for part in scene.facts.parts] == list(scene.sources[1:])


def test_bars_show_the_rows_of_their_table_and_the_largest_is_clear():
    raw = json.loads((ASSETS / "tables.json").read_text())
    charts = [scene for scene in scenes("document") if scene.facts.layout == "chart"]
    assert len(charts) >= 50
    for scene in charts:
        rows = [value for _, value in raw[scene.sources[1].removeprefix("table:")]["rows"]]
        bars = {part.label: part for part in scene.facts.parts}
        assert len(bars) == len(scene.facts.parts), "every bar has its own letter"
        for part in bars.values():
            assert part.value in rows
        first, second = sorted((part.value for part in bars.values()), reverse=True)[:2]
        assert first >= 1.15 * second
        assert bars[answers(scene)["largest"]].value == first
        for part in bars.values():
            left, top, right, bottom = part.box
            assert abs((bottom - top) - 56 * part.value / first) <= 0.5 + 1e-9, "drawn to the nearest pixel"
            if scene.facts.mark is None:
                body = scene.image[top:bottom, left:right].reshape(-1, 3)
                assert (body == body[0]).all(), "a bar is one plain box"
                assert not (scene.image[top - 1, left:right] == body[0]).all(1).any()


def test_the_letter_at_the_mark_is_the_one_under_it():
    seen = Counter()
    for scene in scenes("document"):
        if "at_mark" not in answers(scene):
            continue
        ((x, _),) = mark_centres(scene)
        if scene.facts.layout == "chart":
            middles = [(part.box[0] + part.box[2]) / 2 for part in scene.facts.parts]
            under = scene.facts.parts[int(np.argmin([abs(middle - x - 0.5) for middle in middles]))].label
        else:
            (part,) = scene.facts.parts
            middles = [part.box[0] + 24 * place + 12 for place in range(len(part.label))]
            under = part.label[int(np.argmin([abs(middle - x - 0.5) for middle in middles]))]
        assert answers(scene)["at_mark"] == under
        seen[scene.facts.layout] += 1
    assert min(seen["word"], seen["chart"]) >= 10


def test_a_transcription_is_a_word_of_its_own_split():
    raw = json.loads((ASSETS / "words.json").read_text())
    for split in SPLITS:
        for index in range(60):
            scene = compose("document", split, 6, index)
            if "name" in answers(scene):
                assert answers(scene)["name"].lower() in raw[split]
                assert f"word:{answers(scene)['name'].lower()}" in scene.sources


def test_facts_alone_decide_the_answers():
    for scene in every_scene():
        assert ask(scene.facts) == scene.qa
