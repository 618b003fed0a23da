"""`data inspect` and `data convert`: counts are those of the records, pages are escaped, Parquet reads back."""

import json

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from orchestrator.__main__ import app
from tests.data import writers
from workloads.config import data_from_tree, read_yaml
from workloads.data import arrow, inspection, sources, vetting
from workloads.data.cache import ENVIRONMENT_KEY

EVIL = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def spec(tmp_path):
    """A section `data` over twelve records: eight good ones of which two are the same, two without picture, two bad."""
    domain = writers.llava_json(tmp_path / "set")
    talk = writers.talk
    records = [
        *(talk(i) for i in range(7)), talk(6), talk(20, image="no.png"), talk(21, image="nor.png"),
        talk(22, conversations=[]), talk(23, id=f"r{EVIL}", image=f"../{EVIL}"),
    ]  # fmt: skip
    writers.dump(tmp_path / "set" / "train.json", records)
    writers.dump(tmp_path / "set" / "test.json", [talk(1, id=EVIL, conversations=[
        {"from": "human", "value": EVIL}, {"from": "gpt", "value": EVIL}
    ])])  # fmt: skip
    tree = {"source": "files", "root": str(tmp_path / "set"), "domains": {"d": domain}}
    return writers.dump(tmp_path / "data.yaml", tree)


def invoked(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_inspect_counts_what_there_is(spec):
    done = invoked("data", "inspect", spec, "--model", "pocket")
    assert done.exit_code == 0, done.output
    cells = [
        cell.strip() for cell in next(line for line in done.stdout.splitlines() if "train" in line).split("│")
    ]
    assert cells[1:7] == ["d", "train", "12", "4", "2", "1"]
    assert "d train: 4 bad records; the first is r20: image: missing" in done.stdout


def test_lengths_are_those_of_the_model(spec):
    from workloads.config import ModelConfig
    from workloads.llava.build import build

    data = data_from_tree(read_yaml(spec))
    prompter = build(ModelConfig(), "fp32").prompter
    rows = sources.of(data).load("d", "train")
    lengths = sorted(v.length for v in vetting.vet(rows, prompter, 10**9) if not v.fault)
    found = next(iter(inspection.inspect(data, prompter)))
    assert found.lengths[100] == lengths[-1]
    assert found.lengths[50] == lengths[(len(lengths) + 1) // 2 - 1]
    assert found.num_too_long == 0


def test_the_page_shows_samples_and_escapes_everything(spec, tmp_path):
    page = tmp_path / "page.html"
    done = invoked("data", "inspect", spec, "--page", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert text.count("data:image/jpeg;base64,") == 9
    assert "http" not in text.replace("http-equiv", "")


def test_converted_parquet_reads_back_as_the_same_samples(spec, tmp_path):
    done = invoked("data", "convert", spec, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "d train: 8 records, 4 rejected" in done.stdout
    bad = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in bad] == ["r20", "r21", "r22", f"r{EVIL}"]
    data = [data_from_tree(read_yaml(path)) for path in (spec, tmp_path / "out" / "data.yaml")]
    rows = [[dict(row) for row in sources.of(each).load("d", "train")] for each in data]
    good = [row for row, verdict in zip(rows[0], vetted(data[0]), strict=True) if not verdict.fault]
    assert [{**row, "images": 0} for row in rows[1]] == [{**row, "images": 0} for row in good]
    digests = [[v.digest for v in vetted(each) if not v.fault] for each in data]
    assert digests[0] == digests[1]


def test_converted_pictures_are_written_before_they_are_many_bytes(spec, tmp_path, monkeypatch):
    bound = 2 * len(writers.picture())
    monkeypatch.setattr(arrow, "_BATCH_BYTES", bound)
    done = invoked("data", "convert", spec, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    file = parquet.ParquetFile(tmp_path / "out" / "d" / "train.parquet")
    groups = [file.read_row_group(i).to_pylist() for i in range(file.num_row_groups)]
    assert [row["id"] for group in groups for row in group] == [f"r{i}" for i in (0, 1, 2, 3, 4, 5, 6, "6#7")]
    for group in groups:
        assert sum(len(row["images"][0]["bytes"]) for row in group[:-1]) <= bound


def vetted(data):
    return vetting.vet(sources.of(data).load("d", "train"), None, 0)


def test_a_packaged_recipe_and_a_study_are_specs(tmp_path):
    from orchestrator.commands.data import read

    assert read("pocket", []).mixture == {"general": 1.0, "document": 1.0, "biomedical": 1.0}
    assert read("twice-the-samples", ["data.samples=7"]).samples == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "nowhere"), "'nowhere'"),
        (("inspect", "nowhere.yaml"), "no such file"),
        (("inspect", "SPEC", "samples=3"), "data.KEY=VALUE"),
        (("inspect", "SPEC", "data.domains.d.format=lava_json"), "did you mean 'llava_json'"),
        (("inspect", "SPEC", "data.root=/nowhere"), "no such"),
        (("convert", "SPEC", "--out", "SPEC"), "does not exist yet"),
    ],
)
def test_mistakes_are_one_line(words, expected, spec):
    done = invoked("data", *(spec if word == "SPEC" else word for word in words))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert expected in done.stderr
