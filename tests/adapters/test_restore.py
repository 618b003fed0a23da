"""Adapters of every method, restored in a fresh process that knows their folders alone."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from tests.adapters.minimal import QUESTIONS, TASKS, cases, draw, make_config
from workloads import adapters
from workloads.adapters import icm_lora
from workloads.adapters.base import Trace

ROOT = Path(__file__).parent.parent.parent
CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from tests.adapters.minimal import QUESTIONS, TASKS
from workloads import adapters

folder = Path(sys.argv[1])
inputs, logits = load_file(folder / "inputs.safetensors"), {}
for path in sorted(p for p in (folder / "saved").iterdir()):
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float64).eval()
    _, trace = adapters.load(model, path)
    trace.begin(QUESTIONS, TASKS)
    with torch.no_grad():
        logits[path.name] = model(**inputs).logits
save_file(logits, folder / "logits.safetensors")
"""


def test_every_method_gives_equal_logits_in_a_fresh_process(tiny_llava, batch, tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    save_file(batch, tmp_path / "inputs.safetensors")
    expected = {}
    for case in cases():
        config = make_config(case, tmp_path / "files" / case, tiny_llava)
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
        trace = Trace()
        attached = adapters.attach(model, config, trace)
        trace.watch(model)
        trace.begin(QUESTIONS, TASKS)
        model.model.multi_modal_projector.requires_grad_(True)
        draw(model, adapters.saved_names(model, attached), seed=3)
        adapters.save(
            tmp_path / "saved" / case, adapters.weights_of(model, attached), config, attached, "base"
        )
        with torch.no_grad():
            expected[case] = model(**batch).logits
    for path in (tmp_path / "files").rglob("*"):
        # What a method started from is no longer needed; its sentence encoder is.
        if path.name in (adapters.WEIGHTS, icm_lora.WEIGHTS):
            path.unlink()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    assert set(found) == set(expected)
    for case, logits in expected.items():
        assert torch.equal(found[case], logits), case
