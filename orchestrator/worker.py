"""One run on several workers: a Ray Train group inside a Tune trial, which its metrics come back to."""

from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import RunConfig as TrainRunConfig
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from workloads.config import RunConfig, from_tree, to_tree
from workloads.record import write_json

# Which Ray node each worker of a group ran on.
WORKERS = "workers.json"

# A trial and its workers share the CPUs of one run: the driver needs next to nothing, but 0 is refused.
DRIVER_CPU, WORKER_CPU = 0.01, 0.99


def run_group(config: RunConfig, folder: Path, spread: bool) -> None:
    """Run `config` on its workers and return when all have ended; raises what a worker raised."""
    gpus = config.execution.gpus_per_worker
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"tree": to_tree(config), "folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=config.execution.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": WORKER_CPU, **({"GPU": gpus} if gpus else {})},
            placement_strategy="STRICT_SPREAD" if spread else "PACK",
        ),
        run_config=TrainRunConfig(
            name=folder.name, storage_path=str(folder / ".train"), callbacks=[TuneReportCallback()]
        ),
    )
    trainer.fit()


def _loop(options: dict[str, Any]) -> None:
    """What every worker does: the same run, with the process group that Ray Train has set up."""
    from workloads.run import run
    from workloads.training import engine

    folder = Path(options["folder"])
    run(from_tree(options["tree"]), _report, folder)
    here = {"rank": engine.rank(), "node": ray.get_runtime_context().get_node_id()}
    workers = engine.gather_objects(here)
    if engine.rank() == 0:
        write_json(folder / WORKERS, workers)


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    # Every rank comes here equally often, since Train's report is a barrier.
    step = {"step": metrics["step"]} if "step" in metrics else {}
    ray.train.report({"run_event": dict(metrics), **step})
