"""The page: complete, self-contained, escaped, and useful whatever state the study is in."""

import re
from html.parser import HTMLParser

import pytest

from dashboards.load import study_results
from dashboards.page import render, write
from dashboards.rows import summarise
from dashboards.units import signed
from dashboards.views import arm_colours, legend

EVIL = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</style>"
VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html(study):
    return write(study, study.parent).read_text(encoding="utf-8")


def page_of(folder):
    return Page(render(study_results(folder, folder.parent)))


def test_the_page_is_written_where_it_is_looked_for(study):
    path = write(study, study.parent)
    assert path == study / "report.html"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in study.iterdir() if p.name.startswith(".report")] == []


def test_the_page_needs_no_network_and_runs_no_script(html):
    page = Page(html)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    targets = [
        value for name, value in page.attributes if name in ("href", "src", "srcset", "action", "data")
    ]
    assert targets
    assert all(value.startswith("#") for value in targets)
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html


def test_every_link_leads_to_a_section(html):
    attributes = Page(html).attributes
    ids = {value for name, value in attributes if name == "id"}
    assert {value[1:] for name, value in attributes if name == "href"} <= ids


def test_the_page_is_small(html, write_study, tmp_path):
    assert len(html.encode()) < 300_000
    many = {f"arm_{i}": (0.5, 0.5, 0.5) for i in range(24)}
    folder = write_study(tmp_path, chances=many, seeds=range(8), num_items=30, comparison={})
    assert len(render(study_results(folder, tmp_path)).encode()) < 1_000_000


def test_all_parts_are_there(html):
    ids = {value for name, value in Page(html).attributes if name == "id"}
    assert ids >= {
        "verdict", "differences", "scores", "heat", "types", "experts", "curves", "cost", "limits",
        "configuration", "trials",
    }  # fmt: skip


def test_the_verdict_comes_first_and_has_its_interval(html, study):
    text = Page(html).text
    claims = summarise(study_results(study, study.parent)).claims
    for claim in claims:
        assert claim.word
        assert claim.word.capitalize() in text
        assert f"W = {signed(claim.contrast.difference.mean.mean)}" in text
    assert text.index("Headline: mole_hard") < text.index("Also: mole_scaled") < text.index("Scores Points")


def test_every_cell_of_the_heat_map_is_a_paired_difference_to_solo(html, study):
    results = study_results(study, study.parent)
    heat = html[html.index('id="heat"') : html.index('id="types"')]
    for arm in ("lora_mix", "lora_mix_2n", "lora_mix_iso", "mole_hard", "mole_scaled"):
        row = heat[heat.index(f'<th scope="row">{arm}</th>') :]
        shown = [float(v.replace("−", "-")) for v in re.findall(r"%\">([+−\d.]+)<small>", row)[:4]]
        means = {
            d: [results.scores[a][d].scores_SI.mean() for a in (arm, f"solo_{d}")] for d in results.domains
        }
        expected = [100 * (left - right) for left, right in means.values()]
        assert shown == pytest.approx([*expected, sum(expected) / 3], abs=0.0501)


def test_the_heat_map_is_brown_below_0_and_stronger_further_from_it(html):
    heat = html[html.index('id="heat"') : html.index('id="types"')]
    cells = re.findall(r'class="cell (gain|loss)[^"]*" style="--strength:(\d+)%">([+−\d.]+)<small>', heat)
    assert len(cells) == 20
    values = [float(text.replace("−", "-")) for _, _, text in cells]
    for (colour, _, _), value in zip(cells, values, strict=True):
        assert value == 0 or colour == ("loss" if value < 0 else "gain")
    by_size = sorted(zip(map(abs, values), (int(strength) for _, strength, _ in cells), strict=True))
    assert [strength for _, strength in by_size] == sorted(strength for _, strength in by_size)


def test_solo_arms_are_not_compared_with_themselves(html):
    heat = html[html.index('id="heat"') : html.index('id="types"')]
    assert '<th scope="row">solo' not in heat


def test_the_limits_and_baselines_are_told(html):
    text = Page(html).text
    assert "one averaged brain" in text
    assert "held out with a gap" in text
    assert "majority 21.0 21.0 21.0 21.0" in text
    assert "blind baseline (image removed) was not recorded" in text


def test_a_blind_arm_is_shown_as_a_baseline(write_study, tmp_path):
    chances = {"lora_mix": (0.6, 0.6, 0.6), "blind": (0.2, 0.1, 0.3)}
    folder = write_study(tmp_path, chances=chances, seeds=range(2), num_items=20)
    results = study_results(folder, tmp_path)
    page = page_of(folder)
    expected = [results.scores["blind"][domain].scores_SI.mean() for domain in results.domains]
    words = " ".join(f"{100 * value:.1f}" for value in (*expected, sum(expected) / 3))
    assert f"blind {words}" in page.text
    assert "was not recorded" not in page.text


def test_everything_a_user_wrote_is_escaped(write_study, tmp_path):
    chances = {EVIL: (0.5, 0.5, 0.5), "lora_mix_2n": (0.5, 0.4, 0.5), "lora_mix": (0.6, 0.4, 0.5)}
    folder = write_study(
        tmp_path,
        chances=chances,
        seeds=range(5),
        num_items=20,
        hypothesis=EVIL,
        command=EVIL,
        profile=EVIL,
        comparison={"mole": [EVIL], "headline": EVIL, "double": "lora_mix_2n", "mix": "lora_mix"},
        unfinished={("lora_mix", 0): ("failed", EVIL)},
    )
    html = render(study_results(folder, tmp_path))
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert "49" not in page.text.split("Hypothesis:")[1][:80]
    assert f"Hypothesis: {EVIL}" in page.text
    assert "Headline: " + EVIL in page.text


def test_a_name_that_is_markup_is_escaped_too(write_study, tmp_path):
    folder = write_study(tmp_path, "x", chances={"lora_mix": (0.5, 0.5, 0.5)}, seeds=[0], num_items=12)
    text = (folder / "study.json").read_text()
    (folder / "study.json").write_text(text.replace('"name": "x"', '"name": "<script>x</script>"'))
    html = render(study_results(folder, tmp_path))
    assert "<script" not in html
    assert "&lt;script&gt;x&lt;/script&gt;" in html


def test_a_study_in_progress_says_so_and_shows_what_there_is(write_study, tmp_path):
    unfinished = {("mole_hard", seed): ("running", "") for seed in (1, 2)} | {
        ("lora_mix_2n", 0): ("failed", "RuntimeError: loss is not finite at step 120"),
        ("solo_document", 1): ("interrupted", ""),
        ("mole_scaled", 2): ("stopped", ""),
    }
    page = page_of(write_study(tmp_path, seeds=range(3), num_items=20, unfinished=unfinished, time={}))
    assert "19 of 24 trials finished" in page.text
    assert "Without a result: 5 of 24 trials; failed or cut short: 3." in page.text
    assert "lora_mix_2n 0 failed RuntimeError: loss is not finite at step 120" in page.text
    # One seed of mole_hard has finished, and lora_mix_2n lacks that one.
    assert "No finished run of both arms with one seed yet." in page.text
    assert "2 seeds, and a verdict takes at least 5" not in page.text


def test_one_seed_has_no_verdict_and_the_page_says_what_its_intervals_are(write_study, tmp_path):
    page = page_of(write_study(tmp_path, seeds=[0], num_items=20))
    assert "No verdict" in page.text
    assert "One seed. Intervals are over test items only" in page.text
    assert "1 seed, and a verdict takes at least 5." in page.text
    kinds = [value for name, value in page.attributes if name == "class" and value]
    assert not [
        kind for kind in kinds if kind.startswith(("card gain", "card loss", "chip", "row gain", "row loss"))
    ]


def test_a_study_with_nothing_finished_still_gives_a_page(write_study, tmp_path):
    pending = {(arm, 0): ("pending", "") for arm in ("lora_mix", "mole_hard")}
    chances = dict.fromkeys(("lora_mix", "mole_hard"), (0.5, 0.5, 0.5))
    page = page_of(write_study(tmp_path, chances=chances, seeds=[0], unfinished=pending, time={}))
    assert "No results yet" in page.text
    assert "0 of 2 trials finished" in page.text


def test_a_study_without_roles_shows_scores_and_says_what_the_heat_map_takes(write_study, tmp_path):
    chances = {"lora@lr=0.001": (0.5, 0.5, 0.5), "lora@lr=0.002": (0.6, 0.5, 0.5)}
    page = page_of(write_study(tmp_path, chances=chances, seeds=range(3), num_items=20, comparison={}))
    assert "Not shown: it takes, for each domain, a finished arm of plain LoRA" in page.text
    assert "lora@lr=0.002" in page.text
    assert "verdict" not in {value for name, value in page.attributes if name == "id"}


def test_points_of_a_grid_share_their_arms_colour(write_study, tmp_path):
    chances = dict.fromkeys(("a@lr=1", "a@lr=2", "b@lr=1", "b@lr=2"), (0.5, 0.5, 0.5))
    results = study_results(write_study(tmp_path, chances=chances, seeds=[0], comparison={}), tmp_path)
    colours = arm_colours(results)
    assert colours["a@lr=1"] == colours["a@lr=2"] != colours["b@lr=1"] == colours["b@lr=2"]
    assert legend(results) == {"a": colours["a@lr=1"], "b": colours["b@lr=1"]}


def test_a_premise_that_does_not_hold_is_told(write_study, tmp_path):
    chances = {
        "solo_general": (0.6, 0.1, 0.1), "solo_document": (0.1, 0.6, 0.1), "solo_biomedical": (0.1, 0.1, 0.6),
        "lora_mix": (0.8, 0.8, 0.8), "lora_mix_2n": (0.8, 0.8, 0.8), "mole_hard": (0.8, 0.8, 0.8),
    }  # fmt: skip
    page = page_of(write_study(tmp_path, chances=chances, seeds=range(5), num_items=40))
    assert "The premise is not shown." in page.text


def test_the_same_study_gives_the_same_page(study):
    results = study_results(study, study.parent)
    assert render(results) == render(results)


def test_settings_that_differ_between_arms_are_told_apart_from_shared_ones(html):
    section = html[html.index('id="configuration"') : html.index('id="trials"')]
    differing, shared = section.split("Shared by all runs")
    assert "adapter.router_grad" in differing
    assert "data.samples" in differing
    assert "optim.lr" not in differing
    assert "<dt>optim.lr</dt><dd>0.002</dd>" in shared
    assert "<dt>torch</dt><dd>2.13.0</dd>" in shared
    assert "seed" not in shared


def test_colours_follow_the_readers_choice_of_light_or_dark(html):
    assert "prefers-color-scheme: dark" in html
    light, dark = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)[:2]
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used - names[0] <= {"--tone", "--strength"}
