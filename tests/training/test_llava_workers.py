"""Two workers on LLaVA checkpoints under ZeRO-3: no full copy each, text without images, answers of any length."""

import gc
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.llava import checkpoints
from tests.references import Items
from tests.training.runs import small, two_processes
from workloads import adapters
from workloads.adapters.base import Trace
from workloads.config import ModelConfig
from workloads.data.mixture import Slot
from workloads.data.pool import Sample
from workloads.evaluation.answer import answer
from workloads.llava.build import build, projector_weights, train_projector
from workloads.llava.prompt import Turn
from workloads.training import engine
from workloads.training.loop import Loop

WORDS = ("a cat", "top left", "boot", "it is a cat on a mat", "bag", "there", "right", "A cat. It is a dog.")


def mixed(workers, stage):
    """Four steps on a stream of images and texts in turn: with two workers, one never sees an image."""
    return small(
        "lora",
        execution={
            "workers": workers,
            "zero_stage": stage,
            "micro_batch": 1,
            "report_every": 1,
            "eval_batch": 2,
        },
        optim={"global_batch": 4, "lr": 0.005},
        eval={"max_new_tokens": 12},
    )


def talk(place):
    images = () if place % 2 else (np.full((20 + place, 33, 3), 11 * place, np.uint8),)
    asked = Turn(question="what ?" if place % 2 else "<image>\nwhat is this ?", answer=WORDS[place % 8])
    earlier = (Turn(question="which side is the mark on ?", answer="left"),) if place % 3 == 0 else ()
    return Sample(
        id=f"s{place}", domain="general", images_HWC=images, system="a chat" if place % 4 == 1 else "",
        turns=(*earlier, asked), answers=(asked.answer,), question_type="name",
    )  # fmt: skip


def train_and_answer(folder, workers, stage, out):
    """Train on the stream and answer it; rank 0 writes the losses of every step and all answers to `out`."""
    config = mixed(workers, stage)
    pools = {"general": Items(items=[talk(place) for place in range(16)])}
    stream = [Slot(domain="general", index=place) for place in range(16)]
    reports, trace = [], Trace()
    with engine.contained():
        engine.join()
        llava = build(ModelConfig(name_or_path=str(folder)), "fp32", engine.sharded_init(stage, "fp32"))
        torch.manual_seed(0)
        attached = adapters.attach(llava.model, config.adapter, trace)
        trace.watch(llava.model)
        train_projector(llava.model)
        trained = engine.Engine(llava.model, config.optim, config.execution, projector_weights(llava.model))
        try:
            loop = Loop(config, llava, attached, trace, trained, pools, stream)
            loop.run(out / "checkpoint", reports.append)
            answered = answer(config, llava, trace, pools, {"general": range(15)})
        finally:
            trained.close()
    if engine.rank() == 0:
        found = {
            "curve": [report["loss"] for report in reports],
            "answers": [row["raw"] for row in answered.predictions],
            "loss": answered.losses["general"],
        }
        (out / "found.json").write_text(json.dumps(found))


class AnonymousPeak:
    """The most memory of its own that this process holds while in the context; pages of files do not count."""

    def __enter__(self):
        self.start = self.peak = self._now()
        self.done = False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done = True
        self.thread.join()
        self.growth = self.peak - self.start

    def _watch(self):
        while not self.done:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def _now(self):
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024


def load_and_measure(folder, out):
    """Peak memory of loading in every worker, partitioned and, for comparison, whole."""
    found = {}
    for stage in (0, 3):
        gc.collect()
        with engine.contained():
            engine.join()
            with AnonymousPeak() as memory:
                llava = build(
                    ModelConfig(name_or_path=str(folder)), "fp32", engine.sharded_init(stage, "fp32")
                )
            found[stage] = memory.growth
            del llava
    (out / f"memory-{engine.rank()}.json").write_text(json.dumps(found))


CHILD = """
import sys
from pathlib import Path
from tests.training import test_llava_workers as tests

folder = Path(sys.argv[1])
tests.load_and_measure(folder / "large", folder)
for name in tests.KINDS:
    tests.train_and_answer(folder / name, 2, 3, folder / f"{name}-out")
"""
LARGE = {"width": 1024, "layers": 8}
# A random model that says different things, and ends them at every seventh token of its vocabulary.
TALKATIVE = {"spread": 0.1, "ends": [2, *range(5, 390, 7)]}


KINDS = {"llava": checkpoints.write, "next": checkpoints.write_next}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """What two processes found with the checkpoints in the folder."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints.write(folder / "large", **LARGE)
    for name, write in KINDS.items():
        write(folder / name, **TALKATIVE)
        (folder / f"{name}-out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        # Without a fixed bound glibc keeps freed blocks of all sizes that it has seen, and they would count.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
        two_processes(CHILD, folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def found(request, tmp_path_factory, two_workers):
    """What two workers found with a kind of checkpoint, and what one finds."""
    folder = tmp_path_factory.mktemp("one")
    train_and_answer(two_workers / request.param, 1, 0, folder)
    places = (two_workers / f"{request.param}-out", folder)
    return [json.loads((place / "found.json").read_text()) for place in places]


def test_no_worker_holds_a_full_copy_of_a_partitioned_model_while_it_loads(two_workers):
    whole = sum(2 * p.stat().st_size for p in (two_workers / "large").glob("*.safetensors"))
    assert whole > 300 * 2**20
    for rank in range(2):
        found = json.loads((two_workers / f"memory-{rank}.json").read_text())
        assert found["0"] > 0.95 * whole
        assert found["3"] < 0.65 * whole


def test_a_worker_without_any_image_keeps_step_with_one_that_has_them(found):
    two, one = found
    assert len(one["curve"]) == 4
    assert two["curve"] == pytest.approx(one["curve"], abs=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)


def test_answers_of_different_lengths_are_those_of_one_worker(found):
    two, one = found
    assert len({len(text) for text in one["answers"]}) > 3
    assert two["answers"] == one["answers"]
