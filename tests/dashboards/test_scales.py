"""Domains on several scales: each in its own unit everywhere, and words where their mean would stand."""

import io
import json

import pytest
from rich.console import Console

from dashboards.load import CompareRow, study_results
from dashboards.page import render
from dashboards.rows import summarise
from dashboards.tables import comparison, summary
from dashboards.units import bracket, common, points, signed, told, with_spread
from dashboards.views import baseline_scores, heat_limits, panel_limits, panel_rows
from tests.dashboards.test_page import Page
from workloads.errors import UserError
from workloads.evaluation.statistics import Interval

MIXED = {"document": "cider", "biomedical": "percent"}


def text_of(renderable):
    console = Console(file=io.StringIO(), width=260, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def interval(mean, low, high):
    return Interval(mean=mean, low=low, high=high, df=7.0, num_seeds=8, num_items=100)


@pytest.fixture(scope="module")
def mixed(write_study, tmp_path_factory):
    """A finished study: accuracy in general, CIDEr in document, BLEU in biomedical."""
    folder = write_study(tmp_path_factory.mktemp("mixed"), seeds=range(5), num_items=24, scales=MIXED)
    return study_results(folder, folder.parent)


@pytest.mark.parametrize(
    ("scale", "value", "plain", "with_sign"),
    [
        ("fraction", 0.7134, "71.3", "+71.3"),
        ("percent", 31.24, "31.2", "+31.2"),
        ("cider", 1.2345, "1.234", "+1.234"),
        ("cider", -0.0004, "-0.000", "0.000"),
    ],
)
def test_a_score_is_written_in_the_unit_of_its_scale(scale, value, plain, with_sign):
    assert points(value, scale) == plain
    assert signed(value, scale) == with_sign


def test_intervals_are_written_in_the_unit_of_their_scale():
    assert with_spread(interval(0.8, 0.75, 0.85), "cider") == "0.800 ± 0.050"
    assert bracket(interval(2.0, -1.0, 5.0), "percent") == "[−1.0, +5.0]"


@pytest.mark.parametrize(
    ("scales", "shared"),
    [
        ({"a": "fraction", "b": "fraction"}, "fraction"),
        ({"a": "cider"}, "cider"),
        ({"a": "fraction", "b": "percent"}, None),
        ({"a": "fraction", "b": "cider", "c": "cider"}, None),
    ],
)
def test_only_domains_of_one_scale_have_a_mean(scales, shared):
    assert common(scales) == shared
    assert bool(told(scales)) == (shared is None)
    assert all(f"{domain} 0 to " in told(scales) for domain in scales if not shared)


def test_no_mean_is_made_of_several_scales(mixed):
    found = summarise(mixed)
    for part in (*(row.scores for row in found.arms), *(c.difference for c in found.contrasts)):
        if len(part.by_domain) == 3:
            assert (part.mean, part.seeds_only, part.scale) == (None, None, None)
    assert all(claim.word == "" and "scales differ" in claim.reason for claim in found.claims)
    assert all("mean" not in by_domain for by_domain in baseline_scores(mixed).values())
    assert not [row for row in found.types if row.domain == "mean"]


def test_domain_scores_and_differences_are_means_of_the_files_values(mixed):
    found = summarise(mixed)
    arms = {row.arm: row for row in found.arms}
    for domain in mixed.domains:
        means = {}
        for arm in ("mole_hard", "lora_mix"):
            runs = [run.scores[domain].score for run in mixed.runs(arm)]
            means[arm] = sum(runs) / len(runs)
            assert arms[arm].scores.by_domain[domain].mean == pytest.approx(means[arm])
        difference = arms["mole_hard"].contrasts["recovery"].difference.by_domain[domain]
        assert difference.mean == pytest.approx(means["mole_hard"] - means["lora_mix"])
        assert difference.num_items == 24


def test_a_score_of_the_whole_has_no_question_types(mixed):
    shown = {row.domain: row.scale for row in summarise(mixed).types}
    assert shown == {"general": "fraction", "document": "cider"}


def test_the_tables_show_units_and_words_in_place_of_the_mean(mixed):
    text = text_of(summary(mixed))
    assert "document (CIDEr, 0 to 10)" in text
    assert "biomedical (percent)" in text
    assert "scales differ" in text
    assert "no mean over domains, since their scales differ: general 0 to 1 (fraction)" in text
    line = next(line for line in text.splitlines() if line.startswith("mole_hard "))
    runs = mixed.runs("mole_hard")
    value = sum(run.scores["document"].score for run in runs) / len(runs)
    assert 1 < value < 2
    assert f"{value:.3f} ± " in line
    assert line.rstrip().endswith("scales differ")


def test_the_page_shows_units_and_words_in_place_of_the_mean(mixed):
    text = Page(render(mixed)).text
    assert "No verdict" in text
    assert "No mean over domains, since their scales differ" in text
    assert "general by exact-1 in points, document by cider_d-1 in CIDEr, 0 to 10" in text
    assert "No mean over domains: scales differ." in text
    assert "bars end at 2.000" in text
    runs = mixed.runs("mole_hard")
    for domain, digits in (("document", 3), ("biomedical", 1)):
        value = sum(run.scores[domain].score for run in runs) / len(runs)
        assert f"{value:.{digits}f} ±" in text
        assert f"{100 * value:.1f} ±" not in text
    assert "None" not in text


def test_each_scale_has_an_axis_of_its_own(mixed):
    found = summarise(mixed)
    rows = panel_rows(found)
    assert set(panel_limits(rows)) == set(heat_limits(found)) == {"fraction", "cider", "percent"}
    for row in rows:
        for panel in row.panels:
            assert {scale: len(lines) for scale, lines in panel.rows.items()} == dict.fromkeys(panel.rows, 1)
    assert panel_limits(rows)["percent"] > 10 * panel_limits(rows)["cider"]


def test_one_scale_that_is_no_fraction_has_a_mean_in_its_unit(write_study, tmp_path):
    scales = dict.fromkeys(("general", "document", "biomedical"), "cider")
    folder = write_study(tmp_path, seeds=range(5), num_items=20, scales=scales)
    results = study_results(folder, tmp_path)
    scores = next(row.scores for row in summarise(results).arms if row.arm == "lora_mix")
    assert scores.scale == "cider"
    assert scores.mean.mean == pytest.approx(sum(i.mean for i in scores.by_domain.values()) / 3)
    html = render(results)
    assert f"{scores.mean.mean:.3f}<small>±" in html
    assert "scales differ" not in html
    assert "CIDEr, 0 to 10 against lora_mix_2n" in text_of(summary(results))


def test_runs_scored_by_different_scorers_are_not_compared(write_study, tmp_path):
    folder = write_study(tmp_path, seeds=[0], num_items=12)
    run = next(iter(sorted((tmp_path / "runs").iterdir())))
    tree = json.loads((run / "record.json").read_text())
    tree["scores"]["document"]["scorer_version"] = "exact-2"
    (run / "record.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="'document' was not scored by one scorer: .*exact-") as caught:
        study_results(folder, tmp_path)
    assert "\n" not in str(caught.value)


def compared(arm, scores, scales, **more):
    metrics = {f"score/{domain}": value for domain, value in scores.items()} | more
    return CompareRow(
        study="s", arm=arm, seed=0, method="lora", fingerprint=arm, run_id=arm, status="finished",
        metrics=metrics, scales=scales,
    )  # fmt: skip


def test_compare_shows_each_domain_in_its_unit_and_says_where_no_mean_is():
    rows = [
        compared("mixed", {"general": 0.5, "flickr": 1.25}, {"flickr": "cider"}),
        compared("captions", {"flickr": 0.75}, {"flickr": "cider"}, score=0.75),
        compared("plain", {"general": 0.25}, {}, score=0.25),
    ]
    lines = {line.split()[1]: line for line in text_of(comparison(rows)).splitlines()[2:] if line.strip()}
    assert "1/1 scales differ 50.0 ± ? 1.250 ± ?" in " ".join(lines["mixed"].split())
    assert "1/1 0.750 ± ? – 0.750 ± ?" in " ".join(lines["captions"].split())
    assert "1/1 25.0 ± ? 25.0 ± ? –" in " ".join(lines["plain"].split())
    assert "Scores in points, but for flickr (CIDEr, 0 to 10)" in text_of(comparison(rows))
