"""Mistakes end in one line and exit code 2 within seconds, with nothing written; light commands are quick."""

import socket
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.__main__ import app
from orchestrator.store import Store

# Seconds that a mistake may take to be told, in a process of its own.
TOLD_WITHIN = 8.0


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _refused(words: list[str], *expected: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in expected:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ({"sed": [0]}, ("sed", "did you mean 'seeds'")),
        ({"set": {"optim.lrr": 1}}, ("optim.lrr", "did you mean 'lr'")),
        ({"arms": {"x": {"method": "mule"}}}, ("arms.x.method", "did you mean 'mole'")),
        ({"set": {"data.mixture": {"generall": 1}}}, ("data.mixture.generall", "did you mean 'general'")),
        ({"set": {"data.mixture": {"general": -1, "document": 2}}}, ("data.mixture.general", "-1")),
        ({"set": {"data.mixture": {"general": 0, "document": 0}}}, ("data.mixture", "above 0")),
        ({"set": {"data.samples": 10**8}}, ("data.samples", "100000000")),
        ({"set": {"adapter.rank": 0}}, ("adapter.rank", "0")),
        ({"arms": {"mole": {"set": {"adapter.num_experts": 0}}}}, ("adapter.num_experts", "0")),
        ({"hypothesis": "${oc.env:HOME}"}, ("interpolation",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["check", "plan", "sweep", "submit"])
def test_a_mistake_in_a_study_is_told_by_every_command_and_leaves_nothing(
    verb, study, expected, write_study, tmp_path
):
    path = write_study(**study)
    before = _files(tmp_path)
    root = [] if verb == "check" else ["--root", str(tmp_path / "studies")]
    _refused([verb, str(path), *root], *expected)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sweep", "STUDY", "--root", "FILE/studies"], ("--root", "cannot write")),
        (["submit", "STUDY", "--root", "FILE/studies", "--address", "http://127.0.0.1:1"], ("--address", "no Ray")),
        (["submit", "STUDY", "--root", "ROOT", "--address", "127.0.0.1:8265"], ("--address", "http://HOST:PORT")),
        (["sweep", "STUDY", "--root", "ROOT", "--tracking-uri", "http://127.0.0.1:1"], ("--tracking-uri", "no MLflow")),
        (["sweep", "STUDY", "--root", "ROOT", "--tracking-uri", "ftp://x"], ("--tracking-uri", "ftp://x")),
        (["sweep", "STUDY", "--root", "ROOT", "--address", "127.0.0.1:1"], ("--address", "no Ray cluster")),
        (["sweep", "STUDY", "--root", "ROOT", "--address", "nowhere"], ("--address", "HOST:PORT")),
        (["sweep", "STUDY", "--root", "ROOT", "--profile", "smoke"], ("profile", "'smoke'")),
        (["sweep", "nowhere.yaml", "--root", "ROOT"], ("nowhere.yaml", "no such file")),
        (["reproduce", "twice-the-sample", "--root", "ROOT"], ("did you mean 'twice_the_samples'",)),
        (["reproduce", "twice-the-samples", "--smoke", "--full", "--root", "ROOT"], ("--smoke", "one of the two")),
        (["status", "--root", "ROOT"], ("no study has started",)),
        (["status", "tiny", "--root", "ROOT"], ("'tiny'", "no study has started")),
        (["sync", "tiny", "--root", "ROOT"], ("'tiny'",)),
        (["report", "tiny", "--root", "ROOT"], ("'tiny'",)),
        (["stop", "tiny", "--root", "ROOT"], ("'tiny' was not submitted",)),
        (["compare", "tiny", "--root", "ROOT"], ("tiny",)),
        (["run", "RECIPE", "optim.lr", "--root", "ROOT"], ("override", "key=value")),
        (["run", "RECIPE", "optim.lrr=1", "--root", "ROOT"], ("optim.lrr", "did you mean 'lr'")),
        (["run", "RECIPE", "adapter.rank=0", "--root", "ROOT"], ("adapter.rank", "0")),
        (["run", "RECIPE", "data.mixture=all_equl", "--root", "ROOT"], ("did you mean 'all_equal'",)),
        (["run", "RECIPE", "execution.workers=2", "--root", "ROOT"], ("execution.workers", "sweep")),
        (["run", "RECIPE", "--root", "FILE/studies"], ("--root", "cannot write")),
        (["run", "pockett", "--root", "ROOT"], ("recipe", "'pockett'")),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_and_leaves_nothing(words, expected, write_study, tmp_path):
    study = write_study()
    (tmp_path / "file").write_text("x")
    names = {"STUDY": study, "RECIPE": study.parent / "recipe.yaml", "ROOT": tmp_path / "studies"}
    before = _files(tmp_path)
    given = [str(names.get(word, word)).replace("FILE", str(tmp_path / "file")) for word in words]
    _refused(given, *expected)
    assert _files(tmp_path) == before


def test_a_port_in_use_is_one_line(tmp_path):
    folder = Store(tmp_path).study_folder("tiny")
    folder.mkdir()
    (folder / "study.json").write_text("{}")
    (folder / "mlflow.db").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _refused(["ui", "tiny", "--root", str(tmp_path), "--port", str(port)], "--port", str(port), "in use")


def test_a_second_driver_of_a_study_is_one_line(write_study, tmp_path):
    store = Store(tmp_path / "studies")
    with store.only_driver("tiny"):
        before = _files(tmp_path / "studies")
        _refused(["sweep", str(write_study()), "--root", str(store.root)], "is running it already")
        assert _files(tmp_path / "studies") == before


@pytest.mark.parametrize(
    "words",
    [
        ("check", "STUDY"),
        ("sweep", "STUDY", "--tracking-uri", "http://127.0.0.1:1"),
        ("submit", "STUDY", "--address", "http://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_within_seconds(words, write_study, command, tmp_path):
    study = write_study(set={} if "--address" in words or "--tracking-uri" in words else {"adapter.rnk": 1})
    code, out, err, seconds = command(*(study if word == "STUDY" else word for word in words))
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert seconds < TOLD_WITHIN


def test_debug_shows_where_a_mistake_was_found(write_study, command):
    code, _, err, _ = command("--debug", "check", write_study(sed=[0]))
    assert code == 1
    assert "Traceback" in err
    assert "UserError: sed" in err


def test_help_and_status_answer_at_once_without_torch_ray_or_mlflow(tmp_path):
    import subprocess

    folder = Store(tmp_path).study_folder("tiny")
    folder.mkdir()
    (folder / "study.json").write_text('{"name": "tiny", "created": 1.0, "trials": []}')
    code = (
        "import sys; from typer.testing import CliRunner; from orchestrator.__main__ import app;"
        f"print([CliRunner().invoke(app, w).exit_code for w in (['--help'], ['status', '--root', r'{tmp_path}'],"
        f" ['status', 'tiny', '--root', r'{tmp_path}'], ['version'])]);"
        "print(sorted({'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[0, 0, 0, 0]", "[]"]


def test_a_run_here_is_done_once_and_shown_again(write_study, command, tmp_path):
    recipe = write_study().parent / "recipe.yaml"
    words = ("run", recipe, "data.mixture=general_only", "--root", tmp_path / "studies")
    code, out, err, _ = command(*words)
    assert code == 0, err
    assert "general" in out
    assert "done in" in out
    (folder,) = (tmp_path / "studies" / "runs").iterdir()
    stamp = (folder / "record.json").stat().st_mtime_ns
    code, out, _, _ = command(*words)
    assert code == 0
    assert "was finished already" in out
    assert (folder / "record.json").stat().st_mtime_ns == stamp


def test_check_and_plan_count_the_runs_that_a_study_expands_to(write_study, tmp_path):
    study = write_study(arms=["lora", "mole"], grid={"optim.lr": [0.1, 0.2, 0.3]}, seeds=[0, 1])
    done = CliRunner().invoke(app, ["check", str(study)])
    assert done.exit_code == 0
    assert "12 runs" in done.stdout
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["plan", str(study), "--root", str(tmp_path / "studies")]
    )
    assert done.exit_code == 0
    assert "12 runs to do" in done.stdout
    assert "not measured" in done.stdout
    assert not (tmp_path / "studies").exists()
