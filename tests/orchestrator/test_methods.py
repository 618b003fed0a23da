"""`orchestrator methods`: every method with what it declares and costs, without ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workloads.config import methods

ROOT = Path(__file__).parent.parent.parent
CODE = """
import sys
from orchestrator.__main__ import app
app(["methods"], standalone_mode=False)
print("ray" in sys.modules, "mlflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def lines():
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cells(lines, method):
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return next(row for row in rows if row[0] == method)


def test_every_method_is_listed_with_its_opening_sentence(lines):
    for name in methods():
        assert cells(lines, name)[1].isdigit()
    assert any(line.startswith("MoLE: each token visits") for line in lines)


def test_weights_are_those_on_the_pocket_model(lines):
    attention, mlp, layers = 4 * (128 + 128), 3 * (128 + 384), 4
    all_lora = f"{layers * 8 * (attention + mlp):,}"
    assert cells(lines, "lora")[-4:] == [all_lora, "8", all_lora, "8"]
    experts, rank, router = 3, 8, 3 * 128 + 3
    total = layers * (rank * attention + experts * rank * mlp + router)
    active = total - layers * (experts - 1) * rank * mlp
    as_rank = [str(round(number / (layers * (attention + mlp)))) for number in (total, active)]
    assert cells(lines, "mole")[-4:] == [f"{total:,}", as_rank[0], f"{active:,}", as_rank[1]]


def test_capabilities_are_what_the_method_declares(lines):
    assert cells(lines, "mole")[2:5] == ["token", "no", "no"]
    assert cells(lines, "mtl_lora")[2:7] == ["task", "yes", "always", "no", "yes"]


def test_a_method_that_needs_files_is_listed_with_what_it_needs(lines):
    assert cells(lines, "icm_lora")[-1] == ""
    assert any(line.startswith("icm_lora is not measured: adapter.generator") for line in lines)


def test_neither_ray_nor_mlflow_is_loaded(lines):
    assert lines[-1] == "False False"
