"""Terminal tables: numbers in points, verdicts, unfinished trials, and no markup from users."""

import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from dashboards.load import CompareRow, study_results
from dashboards.rows import summarise
from dashboards.tables import comparison, summary
from dashboards.units import bracket, signed, spread, with_spread
from workloads.evaluation.statistics import Interval

ARMS = ("lora_mix", "lora_mix_2n", "mole_hard", "mole_scaled")
CHANCES = {
    "lora_mix": (0.5, 0.5, 0.5),
    "lora_mix_2n": (0.55, 0.55, 0.55),
    "mole_hard": (0.85, 0.85, 0.85),
    "mole_scaled": (0.3, 0.3, 0.3),
}


def text_of(renderable, width=200):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def interval(mean, low, high):
    return Interval(mean=mean, low=low, high=high, df=7.0, num_seeds=8, num_items=100)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0214, "+2.1"), (-0.0214, "−2.1"), (0.0, "0.0"), (-0.0004, "0.0"), (0.0004, "0.0")]
)
def test_differences_carry_their_sign_and_zero_has_none(value, text):
    assert signed(value) == text


def test_intervals_are_written_in_points():
    assert with_spread(interval(0.713, 0.692, 0.734)) == "71.3 ± 2.1"
    assert bracket(interval(0.021, -0.003, 0.045)) == "[−0.3, +4.5]"
    endless = interval(0.5, -math.inf, math.inf)
    assert (spread(endless), bracket(endless)) == ("± ?", "[no interval]")


def test_the_table_shows_each_arms_score_and_weights(study):
    results = study_results(study, study.parent)
    lines = text_of(summary(results)).splitlines()
    line = next(line for line in lines if line.startswith("mole_hard"))
    runs = results.runs("mole_hard")
    mean = sum(sum(run.scores[d].score for d in run.scores) / 3 for run in runs) / len(runs)
    assert f"{100 * mean:.1f} ± " in line
    assert "611,840" in line
    assert "151,552" in line
    assert "8/8" in line


def test_the_table_shows_what_each_method_needs_and_can_do(study):
    results = study_results(study, study.parent)
    lines = text_of(summary(results)).split("Methods: ")[1].splitlines()
    row = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert row["lora_mix"] == ["lora_mix", "lora", "none", "–", "no", "no", "yes", "–", "–"]
    assert row["mole_hard"][2:7] == ["token", "no", "no", "no", "no"]
    assert row["mole_scaled"][2:7] == ["token", "yes", "no", "no", "no"]


def test_differences_in_the_table_are_differences_of_the_records(study):
    results = study_results(study, study.parent)

    def mean(arm):
        return sum(run.scores[d].score for run in results.runs(arm) for d in run.scores) / 24

    expected = 100 * (mean("mole_hard") - mean("lora_mix_2n"))
    line = next(line for line in text_of(summary(results)).splitlines() if "mole_hard − lora_mix_2n" in line)
    shown = float(line.split("−", 1)[1].split()[2].replace("−", "-"))
    assert line.startswith("W ")
    # Written with one decimal.
    assert abs(shown - expected) <= 0.05 + 1e-9


def test_verdicts_name_both_arms_of_experts(write_study, tmp_path):
    folder = write_study(tmp_path, chances=CHANCES, seeds=range(5), num_items=40)
    text = text_of(summary(study_results(folder, tmp_path)))
    assert "Verdict, mole_hard: reproduced (W = +" in text
    assert "Also, mole_scaled: not reproduced (W = −" in text
    assert "provisional" not in text


def test_few_seeds_give_no_verdict_and_say_so(write_study, tmp_path):
    folder = write_study(tmp_path, chances=CHANCES, seeds=[0], num_items=40)
    text = text_of(summary(study_results(folder, tmp_path)))
    assert "no verdict; 1 seed, and a verdict takes at least 5" in text
    assert "reproduced" not in text


def test_a_verdict_is_provisional_while_its_arms_have_trials_to_finish(write_study, tmp_path):
    unfinished = {("lora_mix_2n", 5): ("running", ""), ("lora_mix", 0): ("failed", "loss is not finite")}
    folder = write_study(tmp_path, chances=CHANCES, seeds=range(6), num_items=40, unfinished=unfinished)
    results = study_results(folder, tmp_path)
    text = text_of(summary(results))
    assert "mole_hard: reproduced, provisional" in text
    assert "failed: lora_mix, seed 0: loss is not finite" in text
    assert "1 of 24 trials are still to finish" in text
    claim = summarise(results).claims[0]
    assert claim.contrast.seeds_left_out == (5,)


def test_missing_arms_are_named_in_place_of_a_verdict(write_study, tmp_path):
    unfinished = {("lora_mix_2n", seed): ("pending", "") for seed in range(5)}
    folder = write_study(tmp_path, chances=CHANCES, seeds=range(5), num_items=20, unfinished=unfinished)
    text = text_of(summary(study_results(folder, tmp_path)))
    assert "mole_hard: no verdict; no finished run of lora_mix_2n yet" in text


def test_a_study_without_roles_or_results_still_gives_tables(write_study, tmp_path):
    half = (0.5, 0.5, 0.5)
    folder = write_study(tmp_path, "plain", chances={"a": half}, seeds=[0, 1], num_items=12, comparison={})
    assert "2 of 2 trials finished" in text_of(summary(study_results(folder, tmp_path)))
    pending = {("b", 0): ("pending", "")}
    empty = write_study(tmp_path, "empty", chances={"b": half}, seeds=[0], unfinished=pending)
    assert "0 of 1 trials finished" in text_of(summary(study_results(empty, tmp_path)))


def test_console_markup_in_names_is_shown_as_it_is(write_study, tmp_path):
    chances = {"[red]arm[/]": (0.5, 0.5, 0.5)}
    folder = write_study(tmp_path, chances=chances, seeds=[0], num_items=12, hypothesis="[bold]x[/bold]")
    text = text_of(summary(study_results(folder, tmp_path)))
    assert "[red]arm[/]" in text
    assert "[bold]x[/bold]" in text


def test_blind_arms_are_baselines_and_not_compared(write_study, tmp_path):
    chances = CHANCES | {"blind": (0.2, 0.1, 0.3), "solo_general": (0.7, 0.1, 0.1)}
    roles = {"solo": {"general": "solo_general"}}
    folder = write_study(tmp_path, chances=chances, seeds=range(5), num_items=20, comparison=roles)
    found = summarise(study_results(folder, tmp_path))
    assert {contrast.arm for contrast in found.contrasts} == set(ARMS)
    assert next(row for row in found.arms if row.arm == "blind").role == "images removed"


def test_solo_has_no_mean_before_every_domain_has_its_arm(write_study, tmp_path):
    chances = {"solo_general": (0.7, 0.1, 0.1), "lora_mix": (0.5, 0.5, 0.5)}
    folder = write_study(tmp_path, chances=chances, seeds=range(2), num_items=20)
    assert summarise(study_results(folder, tmp_path)).solo is None


def test_solo_is_over_the_seeds_that_all_its_arms_have(write_study, tmp_path):
    chances = {f"solo_{domain}": (0.5, 0.5, 0.5) for domain in ("general", "document", "biomedical")}
    unfinished = {("solo_document", 1): ("running", ""), ("solo_general", 2): ("failed", "")}
    folder = write_study(tmp_path, chances=chances, seeds=range(4), num_items=20, unfinished=unfinished)
    results = study_results(folder, tmp_path)
    solo = summarise(results).solo
    assert solo.mean.num_seeds == 2
    document = results.scores["solo_document"]["document"]
    rows = [document.seeds.index(0), document.seeds.index(3)]
    assert solo.by_domain["document"].mean == pytest.approx(document.scores_SI[rows].mean())


def test_question_types_are_shown_per_domain_and_as_their_mean(study):
    rows = summarise(study_results(study, study.parent)).types
    shared = [row.domain for row in rows if row.question_type == "name"]
    assert shared == ["general", "document", "biomedical", "mean"]
    assert [row.domain for row in rows if row.question_type == "total"] == ["document"]
    by_domain = {row.domain: row.scores["lora_mix"].mean for row in rows if row.question_type == "name"}
    parts = [by_domain[domain] for domain in shared[:3]]
    assert by_domain["mean"] == pytest.approx(sum(parts) / 3)


def test_comparison_shows_the_mean_over_seeds_with_a_t_interval():
    rows = [
        CompareRow(
            study="s", arm="lora", seed=seed, method="lora", fingerprint=f"{seed:016x}", run_id=str(seed),
            status="finished", metrics={"score": score, "score/general": score, "score/general/count": 0.1},
        )
        for seed, score in enumerate((0.5, 0.6, 0.7))
    ]  # fmt: skip
    rows.append(dataclasses.replace(rows[0], seed=3, run_id="3", status="running", metrics={}))
    rows[1] = dataclasses.replace(rows[1], words=("token", "yes", "in training", "no", "yes"))
    text = text_of(comparison(rows))
    assert "token yes in training no yes 3/4" in " ".join(text.split())
    half = 4.302652729911275 * np.std([50, 60, 70], ddof=1) / math.sqrt(3)
    assert f"60.0 ± {half:.1f}" in text
    assert "3/4" in text
    assert "count" not in text
