"""A tiny untrained base, a recipe that trains on it in seconds, and the command line as a user calls it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A pocket model with random weights, as a folder."""
    from workloads.data.pocket.questions import vocabulary
    from workloads.llava.pocket import new_model, new_processor

    folder = tmp_path_factory.mktemp("base")
    processor = new_processor(vocabulary())
    new_model(processor.tokenizer, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(base) -> dict:
    """Six steps of 16 samples and 8 answers a domain."""
    return {
        "model": {"name_or_path": str(base)},
        "data": {"mixture": {"general": 1, "document": 1, "biomedical": 1}, "samples": 32},
        "adapter": {"name": "lora", "rank": 2},
        "optim": {"global_batch": 16, "lr": 0.002},
        "eval": {"samples": 8, "split": "val", "max_new_tokens": 4},
        "execution": {"report_every": 1, "eval_batch": 24},
    }


@pytest.fixture
def write_study(tmp_path, recipe):
    """A function that writes a study and its recipe, and returns the study's path."""

    def write(name: str = "tiny", **study) -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        tree = {"recipe": "recipe.yaml", "arms": {"lora": {}}, **study}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def command():
    """A function that runs the command line in a process of its own: (exit code, stdout, stderr, seconds)."""

    def call(*words: object, timeout: float = 240) -> tuple[int, str, str, float]:
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *map(str, words)],
            cwd=REPO,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr, time.monotonic() - begin

    return call
