"""Small real runs for tests: a configuration, a run with its reports, and two workers in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from workloads.config import from_tree
from workloads.identity import fingerprint
from workloads.run import run

ROOT = Path(__file__).parent.parent.parent
MIX = {"general": 1.0, "document": 1.0, "biomedical": 1.0}


def small(adapter="lora", **sections):
    """A run of 12 steps on 96 samples, scored on 8 validation items a domain."""
    ranks = {
        "lora": {"rank": 2},
        "smora": {"rank_total": 4, "top_k": 2},
        "branch_lora": {"rank_total": 8, "num_branches": 4},
    }
    rank = ranks.get(adapter, {"rank_per_expert": 2})
    tree = {
        "adapter": {"name": adapter, "alpha": 4.0, **rank, **sections.pop("adapter_fields", {})},
        "data": {"mixture": MIX, "samples": 32},
        "optim": {"global_batch": 8},
        "eval": {"split": "val", "samples": 8},
        "execution": {"report_every": 3, "micro_batch": 8},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return from_tree(tree)


def do(config, folder):
    """Run `config` in this process; returns the record and all reports."""
    reports = []
    record = run(config, lambda metrics, path: reports.append(metrics), folder)
    return record, reports


def stages(parts, continual, adapter="lora", **sections):
    """Configurations of a stream that start from each other; `parts` holds each task's mixture, in order."""
    configs, before = [], ""
    for task, mixture in parts.items():
        data = {"mixture": mixture, "samples": 24, **sections.get("data", {})}
        config = small(
            adapter,
            **{**sections, "data": data},
            continual={"task": task, **continual},
            init_from=before,
        )
        configs.append(config)
        before = fingerprint(config)
    return configs


def do_stages(configs, runs):
    """Run a stream's stages, each in the folder of its name; returns records and reports."""
    return [do(config, runs / fingerprint(config)) for config in configs]


def two_processes(code, folder):
    """Run the Python `code` as both workers of one group, with `folder` as argument; a hang is ended after 240 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, str(folder)]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], ends[0][1][-3000:] + ends[1][1][-3000:]
