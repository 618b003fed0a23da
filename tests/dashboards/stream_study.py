"""A made-up study with a stream on disk: random scores for every stage, joint and alone runs, an untrained model."""

import hashlib
import json

import numpy as np

from workloads import record as records

TASKS = ("garment", "digits", "mix1")
MIXTURES = {"garment": {"garment": 1.0}, "digits": {"digits": 1.0}, "mix1": {"chart": 1.0, "plane": 0.5}}
NEVER = ("word", "total")
DOMAINS = ("garment", "digits", "chart", "plane", *NEVER)
ORDERS = {"given": TASKS, "reversed": TASKS[::-1], "sampled-0": ("digits", "garment", "mix1")}
COMPARISON = {"before": "base", "joint": "joint", "alone": "alone"}
NUM_ITEMS = 40


def key_of(*parts):
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def scores_of(rng, scales):
    """Shares of right answers, as each scale has them."""
    worth = {"fraction": 1.0, "percent": 100.0, "cider": 10.0}
    out = {}
    for domain in DOMAINS:
        scale = scales.get(domain, "fraction")
        out[domain] = records.DomainScore(
            score=float(rng.uniform(0.1, 0.9)) * worth[scale], num_items=NUM_ITEMS, loss=1.0, by_type={},
            majority=None, scorer=scale, scorer_version=f"{scale}-1", scale=scale,
        )  # fmt: skip
    return out


def write_run(root, key, arm, seed, mixture, scores, routing, forms):
    """A run folder: its record, and items whose means are the scores; `forms` {domain: form} has files' domains.

    What is said is one word or three, as the run's key has it.
    """
    said = np.random.default_rng([*key.encode(), 1])
    folder = root / "runs" / key
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "schema_version": 1, "name": f"{arm}/{seed}", "seed": seed, "init_from": "",
        "data": {"source": "pocket", "mixture": mixture, "samples": 100, "blind": False},
        "adapter": {"name": "lora"}, "eval": {"split": "validation"},
    }  # fmt: skip
    if forms:
        config["data"] |= {"source": "files", "domains": {d: {"form": form} for d, form in forms.items()}}
    rows = [
        {
            "id": f"{domain}-{i}", "domain": domain, "question_type": "name", "prompt": f"what is {i} ?",
            "answer": "yes", "raw": str(said.choice(["dress", "a long dress"])), "normalised": "",
            "score": score.score,
        }
        for domain, score in scores.items() for i in range(NUM_ITEMS)
    ]  # fmt: skip
    (folder / records.PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    capabilities = dict.fromkeys(
        ("needs_task_id_train", "needs_task_id_infer", "mergeable", "stateful"), False
    )
    records.save(
        records.RunRecord(
            fingerprint=key, name=f"{arm}/{seed}", seed=seed, config=config, identity={}, environment={},
            capabilities={**capabilities, "routing": "none", "router_hears_task_loss": False},
            stream_hash="stream", eval_hash="eval", sample_shares={}, token_shares={}, num_steps=6,
            num_samples=100, num_rejected=0, train_loss={}, scores=scores, routing=routing,
            cost=records.Cost(
                seconds=9.0, train_seconds=7.0, eval_seconds=2.0, samples_per_second=14.0,
                tokens_per_second=900.0, peak_bytes=10**9, trainable=100, adapter_weights=100, adapter_active=100,
            ),
        ),
        folder,
    )  # fmt: skip
    return config


def rows_of(arms, orders, seeds, bounds):
    """(arm, seed, order, stage, task, mixture) of every trial."""
    whole = {domain: 1.0 for mixture in MIXTURES.values() for domain in mixture}
    for seed in seeds:
        for role in bounds:
            if role == "alone":
                yield from ((role, seed, "", 1, task, MIXTURES[task]) for task in TASKS)
            else:
                yield COMPARISON[role], seed, "", 0, "", whole
        for place in range(len(TASKS)):
            for arm in arms:
                for label in orders:
                    task = ORDERS[label][place]
                    yield arm, seed, label, place + 1, task, MIXTURES[task]


def make_stream(root, name="coin", **changes):
    """Write study.json and its runs; returns the study's folder.

    Changes: arms, orders (labels), seeds, bounds (roles), scales {domain: scale}, comparison,
    unfinished {(arm, order, seed, stage): (status, error)}, routing, forms {domain: form}, and any key of study.json.
    """
    arms, orders = changes.pop("arms", ("lora", "ewc")), changes.pop("orders", tuple(ORDERS))
    seeds, bounds = changes.pop("seeds", range(3)), changes.pop("bounds", tuple(COMPARISON))
    scales, unfinished = changes.pop("scales", {}), changes.pop("unfinished", {})
    routing, forms = changes.pop("routing", {}), changes.pop("forms", {})
    trials = []
    for arm, seed, order, stage, task, mixture in rows_of(arms, orders, seeds, bounds):
        # Stages with one beginning are one run.
        key = key_of(arm, seed, *(ORDERS[order][:stage] if order else [stage, task]))
        status, error = unfinished.get((arm, order, seed, stage), ("finished", ""))
        row = {"arm": arm, "seed": seed, "order": order, "stage": stage, "task": task, "fingerprint": key}
        row["config"] = {"data": {"mixture": mixture}}
        if status == "finished":
            rng = np.random.default_rng([*key.encode()])
            write_run(root, key, arm, seed, mixture, scores_of(rng, scales), routing, forms)
        trials.append(row | {"status": status, "error": error, "started": 1.8e9, "ended": 1.8e9 + 60})
    tree = {
        "schema_version": 1, "name": name, "hypothesis": "replay forgets less", "profile": "full",
        "command": "orchestrator sweep coin", "created": 1_763_000_000.0, "tree": {}, "trials": trials, "time": {},
        "comparison": {role: COMPARISON[role] for role in bounds},
    }  # fmt: skip
    records.write_json(root / name / "study.json", tree | changes)
    return root / name
