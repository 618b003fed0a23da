"""`score`: a table or JSON from a predictions file alone, at once and without torch; mistakes are one line."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.__main__ import app


def row(name, **changed):
    fixed = {"domain": "general", "question_type": "count", "prompt": "how many ?", "answer": "4"}
    return {"id": name, **fixed, "raw": "4", "normalised": "4", "score": 1.0, **changed}


@pytest.fixture
def score(tmp_path):
    """A function that writes rows and runs `score` on them."""

    def call(rows, *words):
        path = tmp_path / "predictions.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["score", str(path), *words])

    return call


def test_scores_stand_by_domain_and_question_type_with_scorer_and_scale(score):
    done = score([row("1"), row("2", question_type="name", raw="5", score=0.0), row("3", domain="document")])
    assert done.exit_code == 0
    cells = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert ["general", "all", "exact-1", "fraction,", "0", "to", "1", "2", "0.5000"] in cells
    assert ["general", "name", "exact-1", "fraction,", "0", "to", "1", "1", "0.0000"] in cells
    assert "mean over domains: 0.7500 (fraction)" in done.stdout
    assert "all 3 recorded scores are the same" in done.stdout


def test_a_recorded_score_that_differs_is_said(score):
    done = score([row("1"), row("2", score=0.0)])
    assert (
        "1 of 2 recorded scores differ; the first is '2' of 'general': 0 recorded, 1 recomputed"
        in done.stdout
    )


def test_different_scales_are_not_averaged(score):
    done = score([row("1"), row("2", domain="flickr", scorer="cider_d")])
    assert done.exit_code == 0
    assert "no mean over domains, since the scales differ" in done.stdout
    assert "mean over domains:" not in done.stdout


def test_markup_and_brackets_in_names_are_shown_as_they_are(score):
    assert "[bold]x[/bold]" in score([row("1", domain="[bold]x[/bold]")]).stdout


def test_json_holds_the_same_numbers(score):
    done = score([row("1", raw="Two", answer=["2"] * 10, score=0.5)], "--scorer", "vqa", "--json")
    tree = json.loads(done.stdout)
    (group,) = tree["groups"]
    assert (group["version"], group["scale"], group["score"]) == ("vqa-1", "fraction", 1.0)
    assert (tree["mean"], tree["num_compared"], tree["num_differing"]) == (1.0, 1, 1)
    assert tree["first_difference"] == {"domain": "general", "id": "1", "recorded": 0.5, "recomputed": 1.0}


@pytest.mark.parametrize(
    ("rows", "words", "expected"),
    [
        ([row("1")], ["--scorer", "vqaa"], ("--scorer", "'vqaa'", "did you mean 'vqa'")),
        ([row("1"), row("1")], [], ("line 2", "twice")),
        ([row("1", raw=None)], [], ("line 1", "'raw'")),
        ([], [], ("no predictions",)),
    ],
)
def test_a_mistake_is_one_line(score, rows, words, expected):
    done = score(rows, *words)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in expected)


def test_scoring_needs_no_torch_ray_or_mlflow(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        json.dumps(row("1")) + "\n" + json.dumps(row("2", domain="flickr", scorer="cider_d")) + "\n"
    )
    code = (
        "import sys; from typer.testing import CliRunner; from orchestrator.__main__ import app;"
        f"print(CliRunner().invoke(app, ['score', r'{path}']).exit_code,"
        "sorted({'torch', 'ray', 'mlflow', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "0 []"
