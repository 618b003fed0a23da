"""Every method trains with two workers at every ZeRO stage: no rank waits for another, and what is saved is whole.

The ranks see samples of different tasks, one each, so that methods that route by sample or task leave experts of a
rank without any token; in the last step one rank has nothing but a sample that does not count.
"""

import faulthandler
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.adapters.minimal import TASKS, cases, draw, make_config, sorting_pays
from tests.training.runs import two_processes
from workloads import adapters
from workloads.adapters.base import Trace
from workloads.config import DataConfig, RunConfig, from_tree
from workloads.data import pool
from workloads.data.mixture import Slot
from workloads.llava.build import build, projector_weights, train_projector
from workloads.llava.folder import resolve
from workloads.training import checkpoint, engine
from workloads.training.loop import Loop

STAGES = (1, 2, 3)
# Seconds after which a method counts as hanging.
PATIENCE = 60
SLOTS = [Slot(domain=TASKS[0], index=0), Slot(domain=TASKS[1], index=0), Slot(domain=TASKS[0], index=1)]

CHILD = """
import sys
from pathlib import Path
from tests.training.test_method_workers import work

work(Path(sys.argv[1]), stage={stage})
"""


def write_base(folder):
    """The pocket base with fewer, narrower blocks and random weights."""
    pocket = resolve("pocket")
    folder.mkdir()
    for path in pocket.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    shape = LlavaConfig.from_pretrained(pocket)
    for part in (shape.text_config, shape.vision_config):
        part.num_hidden_layers, part.hidden_size, part.intermediate_size = 2, 32, 48
        part.num_attention_heads = 2
    shape.text_config.num_key_value_heads, shape.text_config.head_dim = 2, 16
    torch.manual_seed(0)
    LlavaForConditionalGeneration(shape).save_pretrained(folder)


def make(folder):
    """The base model and what the methods read; writes the configuration of every case."""
    write_base(folder / "base")
    model = config_of(folder, {"name": "lora"}).model
    for case in cases():
        made = make_config(case, folder / case, lambda: build(model, "fp32").model)
        (folder / f"{case}.json").write_text(json.dumps(asdict(made)))


def config_of(folder, adapter, stage=0):
    """A run of two workers with one sample each."""
    return from_tree(
        {
            "model": {"name_or_path": str(folder / "base")},
            "adapter": adapter,
            "data": {"mixture": dict.fromkeys(TASKS, 1.0)},
            "optim": {"global_batch": 2, "lr": 0.01},
            "execution": {"workers": 2, "zero_stage": stage, "micro_batch": 1, "report_every": 1},
        }
    )


def work(folder: Path, stage: int):
    """Train all methods one after the other as one of two workers; rank 0 writes what was reported."""
    engine.join()
    prompter = build(config_of(folder, {"name": "lora"}).model, "fp32").prompter
    pools = {task: pool.load(DataConfig(), task, "train", prompter) for task in TASKS}
    found = {}
    for case in cases():
        print(case, file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        config = config_of(folder, json.loads((folder / f"{case}.json").read_text()), stage)
        began = time.monotonic()
        with engine.contained(), sorting_pays():
            found[case] = trained(config, pools)
        found[case]["seconds"] = time.monotonic() - began
        faulthandler.cancel_dump_traceback_later()
    if engine.rank() == 0:
        (folder / f"stage-{stage}.json").write_text(json.dumps(found))


def trained(config: RunConfig, pools):
    """Loss of every step, and what was saved by every rank."""
    trace, stage = Trace(), config.execution.zero_stage
    llava = build(config.model, "fp32", engine.sharded_init(stage, "fp32"))
    torch.manual_seed(0)
    attached = adapters.attach(llava.model, config.adapter, trace)
    trace.watch(llava.model)
    # The second task of a stream: what the first one left behind takes part.
    attached.on_task_start(TASKS[0])
    draw(
        llava.model, {name for name, w in llava.model.named_parameters() if w.requires_grad}, seed=0, std=0.1
    )
    attached.on_task_end(TASKS[0])
    attached.on_task_start(TASKS[1])
    train_projector(llava.model)
    torch.manual_seed(engine.rank())
    mine = engine.Engine(llava.model, config.optim, config.execution, projector_weights(llava.model))
    reports = []
    try:
        Loop(config, llava, attached, trace, mine, pools, SLOTS).run(Path("nowhere"), reports.append)
        attached.on_task_end(TASKS[1])
        weights = checkpoint.weights_of(llava.model, attached)
    finally:
        mine.close()
        trace.clear()
    saved = {}
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        saved[name] = [list(weight.shape), hashlib.sha256(weight.numpy().tobytes()).hexdigest()]
    return {"losses": [report["loss"] for report in reports], "saved": engine.gather_objects(saved)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    make(folder)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def found(request, base):
    """What two workers report of every method at one stage."""
    two_processes(CHILD.format(stage=request.param), base)
    return json.loads((base / f"stage-{request.param}.json").read_text())


@pytest.fixture(scope="module")
def shapes(base):
    """Shapes of what each method saves, from a model in this process."""

    def of(case):
        config = config_of(base, json.loads((base / f"{case}.json").read_text()))
        model = build(config.model, "fp32").model
        attached = adapters.attach(model, config.adapter, Trace())
        model.get_submodule("model.multi_modal_projector").requires_grad_(True)
        return {name: list(w.shape) for name, w in adapters.weights_of(model, attached).items()}

    return {case: of(case) for case in cases()}


def test_no_method_hangs_and_every_loss_is_finite(found):
    assert sorted(found) == sorted(cases())
    for case, result in found.items():
        assert len(result["losses"]) == 2, case
        assert all(math.isfinite(loss) for loss in result["losses"]), case


def test_what_is_saved_is_whole_and_the_same_on_both_workers(found, shapes):
    for case, result in found.items():
        first, second = result["saved"]
        assert first == second, case
        assert {name: shape for name, (shape, _) in first.items()} == shapes[case], case


def test_the_stage_leaves_the_losses_as_they_are(found, base):
    for path in base.glob("stage-*.json"):
        other = json.loads(path.read_text())
        for case, result in found.items():
            assert result["losses"] == pytest.approx(other[case]["losses"], abs=1e-4), case
