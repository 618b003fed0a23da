"""Small real runs for tests: a configuration, and a run with its reports."""

from workloads.config import from_tree
from workloads.run import run

MIX = {"general": 1.0, "document": 1.0, "biomedical": 1.0}


def small(adapter="lora", **sections):
    """A run of 12 steps on 96 samples, scored on 8 validation items a domain."""
    rank = {"rank": 2} if adapter == "lora" else {"rank_per_expert": 2}
    tree = {
        "adapter": {"name": adapter, "alpha": 4.0, **rank, **sections.pop("adapter_fields", {})},
        "data": {"mixture": MIX, "samples": 32},
        "optim": {"global_batch": 8},
        "eval": {"split": "val", "samples": 8},
        "execution": {"report_every": 3, "micro_batch": 8},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return from_tree(tree)


def do(config, folder):
    """Run `config` in this process; returns the record and all reports."""
    reports = []
    record = run(config, lambda metrics, path: reports.append(metrics), folder)
    return record, reports
