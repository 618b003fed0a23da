"""The page of a stream: all figures, numbers of the files, escaped names, half-finished studies, other scales."""

import dataclasses
import json
import re

import pytest

from dashboards import stream_views
from dashboards.load import study_results
from dashboards.page import render, write
from dashboards.streams import stream_of
from tests.dashboards.stream_study import ORDERS, TASKS, make_stream
from tests.dashboards.test_page import EVIL, Page
from tests.dashboards.test_streams import cell, files

SECTIONS = {"stream", "plasticity", "orders", "matrices"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """3 orders x 3 seeds x 2 arms x 3 stages. Not to be changed."""
    routing = {task: [[0.25, 0.75]] for task in ("garment", "digits", "chart")}
    return make_stream(tmp_path_factory.mktemp("streams"), routing=routing)


@pytest.fixture(scope="module")
def html(folder):
    return write(folder, folder.parent).read_text()


def read(folder):
    return study_results(folder, folder.parent)


def ids(page):
    return {value for name, value in page.attributes if name == "id"}


def test_all_figures_are_there_with_their_words(html):
    page = Page(html)
    assert ids(page) >= SECTIONS | {"experts"}
    assert "selector" not in ids(page)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any(label.startswith("garment, learned at stage 1: ") for label in labels)
    assert any(re.match(r"(lora|ewc): learned [\d.]+, forgotten ", label) for label in labels)
    links = {value for name, value in page.attributes if name == "href"}
    assert {link.removeprefix("#") for link in links} <= ids(page)
    assert not {"script", "img", "link"} & set(page.tags)
    assert "Missing:" not in page.text


def test_the_maps_cells_are_means_over_seeds_of_the_files(folder):
    runs = files(folder)
    view = next(view for view in stream_views.view_of(read(folder)).arms if view.arm == "ewc")
    assert (view.order, view.tasks) == ("given", TASKS)
    assert view.rows[0].label == "untrained"
    for stage, task in enumerate(TASKS, start=1):
        for place, other in enumerate((*TASKS, *view.never)):
            values = [cell(runs["ewc", "given", seed, stage, task], other) for seed in range(3)]
            found = view.rows[stage].cells[place]
            assert found.interval.mean == pytest.approx(sum(values) / 3)
            assert found.is_own == (place == stage - 1)


def test_the_strip_has_a_dot_for_each_order_and_seed(folder):
    runs = files(folder)
    strip = next(strip for strip in stream_views.view_of(read(folder)).strips if strip.arm == "lora")
    wanted = [
        sum(cell(runs["lora", order, seed, 3, tasks[2]], task) for task in tasks) / 3
        for order, tasks in ORDERS.items()
        for seed in range(3)
    ]
    assert [dot.value for dot in strip.dots] == pytest.approx(wanted)
    assert len({dot.colour for dot in strip.dots}) == 3


def test_experts_are_shown_after_the_last_stage_of_one_order(folder):
    results = read(folder)
    ends = {
        row["fingerprint"]
        for row in json.loads((folder / "study.json").read_text())["trials"]
        if row["stage"] == 3
    }
    runs = results.last_runs("lora")
    assert len(runs) == 3
    assert {run.fingerprint for run in runs} < ends


def test_everything_a_user_wrote_is_escaped(folder, tmp_path):
    (tmp_path / "runs").symlink_to(folder.parent / "runs")
    for word in ("garment", "lora", "given", "ewc", "reversed"):
        text = (folder / "study.json").read_text()
        changed = text.replace(f'"arm": "{word}"', f'"arm": {json.dumps(EVIL)}')
        changed = changed.replace(f'"order": "{word}"', f'"order": {json.dumps(EVIL)}')
        changed = changed.replace(f'"task": "{word}"', f'"task": {json.dumps(EVIL)}')
        assert changed != text
        other = tmp_path / word
        other.mkdir()
        (other / "study.json").write_text(changed)
        html = render(study_results(other, tmp_path))
        assert "<script" not in html
        assert EVIL not in html
        assert "&lt;script&gt;" in html
        Page(html)


def test_a_half_finished_stream_draws_what_is_there_and_says_what_is_missing(tmp_path):
    later = {
        (arm, order, seed, stage): ("pending", "")
        for arm in ("lora", "ewc") for order in ORDERS for seed in range(3) for stage in (2, 3)
        if (arm, order) != ("lora", "given") or (seed, stage) == (2, 3)
    }  # fmt: skip
    folder = make_stream(tmp_path, unfinished=later)
    page = Page(render(read(folder)))
    assert ids(page) >= SECTIONS
    assert "ewc, order given, seed 0: stage 2 (digits) is still to run, and 1 after it" in page.text
    assert "2 of 3 seeds" in page.text
    assert "2 of 9 whole" in page.text


def test_a_stream_whose_first_stages_alone_are_done_has_maps_and_no_means(tmp_path):
    later = {
        ("lora", "given", seed, stage): ("running", "") for seed in range(2) for stage in (2, 3)
    } | {("base", "", seed, 0): ("pending", "") for seed in range(2)}  # fmt: skip
    folder = make_stream(
        tmp_path, arms=("lora",), orders=("given",), seeds=[0, 1], bounds=("before",), unfinished=later
    )
    page = Page(render(read(folder)))
    assert {"stream", "matrices", "cost", "configuration"} <= ids(page)
    assert not {"plasticity", "orders", "scores"} & ids(page)
    assert "before: no finished run of base" in page.text
    assert "No results yet" not in page.text


def test_a_stream_with_nothing_finished_still_gives_a_page(tmp_path):
    rows = {("lora", "given", 0, stage): ("pending", "") for stage in (1, 2, 3)}
    folder = make_stream(tmp_path, arms=("lora",), orders=("given",), seeds=[0], bounds=(), unfinished=rows)
    page = Page(render(read(folder)))
    assert "No results yet" in page.text
    assert "lora, order given, seed 0: stage 1 (garment) is still to run, and 2 after it" in page.text


def test_tasks_on_several_scales_have_curves_each_on_its_own_axis_and_no_means(tmp_path):
    folder = make_stream(tmp_path, scales={"digits": "cider"}, seeds=[0, 1], orders=("given", "reversed"))
    results = read(folder)
    page = Page(render(results))
    assert not {"plasticity", "orders"} & ids(page)
    assert "No mean over domains, since their scales differ" in page.text
    view = stream_views.view_of(results).arms[0]
    assert set(view.curves) == {"fraction", "cider"}
    assert [line.task for line in view.curves["cider"][0]] == ["digits"]


def test_what_a_selector_found_is_counted_over_seeds_after_the_last_stage(folder, monkeypatch):
    stream = stream_of(read(folder))
    found = [
        {"garment": {"garment": 6, "digits": 4}, "digits": {"digits": 10 - seed, "mix1": seed}}
        for seed in range(3)
    ]

    def with_selector(chain):
        if chain.arm != "ewc":
            return chain
        accuracy = (16 - chain.seed) / 20
        last = dataclasses.replace(chain.runs[-1], selected=found[chain.seed], selector_accuracy=accuracy)
        return dataclasses.replace(chain, runs=(*chain.runs[:-1], last))

    chains = tuple(map(with_selector, stream.chains))
    changed = dataclasses.replace(stream, chains=chains)
    assert stream_views._selector(changed, "lora") is None
    view = stream_views._selector(changed, "ewc")
    assert view.found == ("garment", "digits", "mix1")
    assert view.rows == {"garment": ((18, 60), (12, 40), (0, 0)), "digits": ((0, 0), (27, 90), (3, 10))}
    assert view.accuracy.mean == pytest.approx((16 + 15 + 14) / 60)
    whole = dataclasses.replace(stream_views.view_of(read(folder)), selectors=(view,))
    monkeypatch.setattr(stream_views, "view_of", lambda _: whole)
    page = Page(render(read(folder)))
    assert "selector" in ids(page)
    assert "18 60 % 12 40 % 0 0 %" in page.text


def test_the_page_of_a_study_without_a_stream_has_no_part_of_one(study):
    page = Page(render(study_results(study, study.parent)))
    assert not SECTIONS & ids(page)
    assert "Scores outside the stream" not in page.text
