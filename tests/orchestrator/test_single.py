"""What `run` prints: every score in its unit with the error of its items, and a mean only on one scale."""

import io

import pytest
from rich.console import Console

from orchestrator.single import show
from tests.test_record import example
from workloads.record import DomainScore


def domain(score, **changed):
    fixed = {"num_items": 50, "loss": 1.0, "by_type": {}, "majority": 0.25, "error": 0.0321}
    return DomainScore(score=score, **{**fixed, **changed})


CAPTIONS = domain(
    1.2345, majority=None, scorer="cider_d", scorer_version="cider_d-1", scale="cider", error=0.0404
)
BLEU = domain(31.24, majority=None, scorer="bleu", scorer_version="bleu-1", scale="percent", error=2.5)


def shown(tmp_path, **scores):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    record = example()
    record.scores.clear()
    record.scores.update(scores)
    show(record, tmp_path, console, None)
    return [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("score", "line"),
    [
        (domain(0.713), "d exact-1 71.3 3.2 50 1.000 25.0"),
        (domain(0.713, error=None, majority=None), "d exact-1 71.3 – 50 1.000 –"),
        (CAPTIONS, "d (CIDEr, 0 to 10) cider_d-1 1.234 0.040 50 1.000 –"),
        (BLEU, "d (percent) bleu-1 31.2 2.5 50 1.000 –"),
    ],
)
def test_a_score_stands_in_its_unit_with_the_error_of_its_items(score, line, tmp_path):
    assert line in shown(tmp_path, d=score)


def test_the_mean_is_over_domains_of_one_scale(tmp_path):
    assert "mean over domains: 60.0 points" in shown(tmp_path, a=domain(0.7), b=domain(0.5))
    lines = shown(tmp_path, a=domain(0.7), b=CAPTIONS)
    told = "no mean over domains, since their scales differ: a 0 to 1 (fraction), b 0 to 10 (cider)"
    assert told in lines
    assert not [line for line in lines if line.startswith("mean")]
