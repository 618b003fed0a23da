"""A made-up study on disk, in the real formats: arms x seeds x domains x items, with known effects."""

import hashlib
import json
import math

import numpy as np
import pytest

from workloads import record as records

DOMAINS = ("general", "document", "biomedical")
TYPES = {
    "general": ("name", "count", "side", "where", "at_mark", "largest"),
    "document": ("name", "count", "side", "where", "at_mark", "largest", "total"),
    "biomedical": ("name", "count", "side", "where", "at_mark"),
}
COMPARISON = {
    "solo": {domain: f"solo_{domain}" for domain in DOMAINS},
    "mix": "lora_mix",
    "double": "lora_mix_2n",
    "iso": "lora_mix_iso",
    "mole": ["mole_hard", "mole_scaled"],
    "headline": "mole_hard",
}
# Arm -> chance of a right answer in each domain.
CHANCES = {
    "solo_general": (0.78, 0.15, 0.12),
    "solo_document": (0.20, 0.71, 0.10),
    "solo_biomedical": (0.18, 0.12, 0.90),
    "lora_mix": (0.70, 0.60, 0.88),
    "lora_mix_2n": (0.73, 0.66, 0.90),
    "lora_mix_iso": (0.77, 0.70, 0.90),
    "mole_hard": (0.74, 0.64, 0.89),
    "mole_scaled": (0.79, 0.72, 0.91),
}
# Scorer of a scale -> its version, and what a right answer is worth.
SCORERS = {"fraction": ("exact", 1.0), "percent": ("bleu", 100.0), "cider": ("cider_d", 2.0)}
WEIGHTS = {"lora": (412_160, 148_480, 148_480), "mole": (611_840, 348_160, 151_552)}


def fingerprint_of(arm, seed):
    return hashlib.sha256(f"{arm}/{seed}".encode()).hexdigest()[:16]


def config_of(arm, seed, mixture, method):
    adapter = {"name": method, "rank": 2, "alpha": 4.0, "dropout": 0.0}
    if method == "mole":
        adapter |= {"num_experts": 3, "router_grad": "scaled" if "scaled" in arm else "hard"}
    if "iso" in arm:
        adapter["rank"] = 6
    return {
        "schema_version": 1,
        "name": f"{arm}/{seed}",
        "seed": seed,
        "init_from": "",
        "model": {"name_or_path": "pocket", "train_projector": True},
        "data": {
            "source": "pocket",
            "mixture": mixture,
            "samples": 4000 if "2n" in arm else 2000,
            "blind": arm == "blind",
        },
        "adapter": adapter,
        "optim": {"lr": 0.002, "global_batch": 16, "clip": 1.0, "dtype": "fp32"},
        "eval": {"split": "test", "domains": [], "samples": 60, "max_new_tokens": 8},
        "execution": {"workers": 1, "micro_batch": 16, "threads": 1},
    }


def predictions_of(rng, chances, seed_shift, num_items):
    """Rows of predictions.jsonl; an item is as hard for every arm and seed."""
    rows = []
    for d, domain in enumerate(DOMAINS):
        hard = np.random.default_rng(d).normal(0, 0.18, num_items)
        for i in range(num_items):
            chance = min(max(chances[d] + hard[i] + seed_shift, 0.02), 0.98)
            score = float(rng.uniform() < chance)
            rows.append(
                {
                    "id": f"{domain}-test-{i}",
                    "domain": domain,
                    "question_type": TYPES[domain][i % len(TYPES[domain])],
                    "prompt": f"what is item {i} ?",
                    "answer": "yes",
                    "raw": " yes" if score else " no",
                    "normalised": "yes" if score else "no",
                    "score": score,
                }
            )
    return rows


def on_scale(row, scale):
    """The row as the scorer of that scale leaves it; BLEU's rows have no scores of their own."""
    name, worth = SCORERS[scale]
    row = {**row, "value" if scale == "percent" else "score": row["score"] * worth, "scorer": f"{name}-1"}
    if scale == "percent":
        del row["score"]
    return row


def value_of(row):
    return row["score"] if "score" in row else row["value"]


def domain_scores(rows, scales):
    out = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = [row for row in rows if row["domain"] == domain]
        by_type = {}
        for name in dict.fromkeys(row["question_type"] for row in mine):
            hits = [value_of(row) for row in mine if row["question_type"] == name]
            by_type[name] = (sum(hits) / len(hits), len(hits))
        score = sum(value_of(row) for row in mine) / len(mine)
        scale = scales.get(domain, "fraction")
        scorer = SCORERS[scale][0]
        out[domain] = records.DomainScore(
            score=score, num_items=len(mine), loss=1.4 - score, by_type=by_type,
            majority=0.21 if scale == "fraction" else None, scorer=scorer, scorer_version=f"{scorer}-1", scale=scale,
        )  # fmt: skip
    return out


def routing_of(rng):
    shares = rng.dirichlet([2.0, 2.0, 2.0], size=(len(DOMAINS), 4))
    return {domain: shares[d].round(4).tolist() for d, domain in enumerate(DOMAINS)}


def write_run(root, arm, seed, chances, num_items, scales):
    """One finished run folder; returns its fingerprint and configuration."""
    rng = np.random.default_rng([seed, *arm.encode()])
    method = "mole" if arm.startswith("mole") else "lora"
    mixture = {arm.removeprefix("solo_"): 1.0} if arm.startswith("solo_") else dict.fromkeys(DOMAINS, 1.0)
    config = config_of(arm, seed, mixture, method)
    fingerprint = fingerprint_of(arm, seed)
    folder = root / "runs" / fingerprint
    folder.mkdir(parents=True)
    shift = float(np.random.default_rng(seed).normal(0, 0.015) + rng.normal(0, 0.01))
    rows = predictions_of(rng, chances, shift, num_items)
    rows = [on_scale(row, scales[row["domain"]]) if row["domain"] in scales else row for row in rows]
    (folder / records.PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_samples = sum(round(weight * config["data"]["samples"]) for weight in mixture.values())
    num_steps = num_samples // 16
    for step in range(25, num_steps + 1, 25):
        level = 0.5 + 2.5 * math.exp(-step / (num_steps / 4))
        losses = {f"loss/{domain}": level + rng.normal(0, 0.08) for domain in mixture}
        event = {"event": "train", "time": 1.8e9 + step, "step": step, "num_steps": num_steps}
        records.append_event(folder, event | {"loss": level, **losses})
    trainable, weights, active = WEIGHTS[method]
    records.save(
        records.RunRecord(
            fingerprint=fingerprint,
            name=f"{arm}/{seed}",
            seed=seed,
            config=config,
            identity={"model": "pocket-3fa9", "data": "1-77aa01", "method": f"{method}-1", "scorer": "1"},
            environment={"python": "3.11.9", "torch": "2.13.0", "git": "0123abc", "platform": "Linux x86_64"},
            capabilities={
                "needs_task_id_train": False,
                "needs_task_id_infer": False,
                "mergeable": method == "lora",
                "stateful": False,
                "routing": "token" if method == "mole" else "none",
                "router_hears_task_loss": "scaled" in arm,
            },
            stream_hash=f"stream-{seed}-{num_samples}",
            eval_hash="eval-5d5d",
            sample_shares={domain: 1 / len(mixture) for domain in mixture},
            token_shares={domain: 1 / len(mixture) for domain in mixture},
            num_steps=num_steps,
            num_samples=num_samples,
            num_rejected=0,
            train_loss=dict.fromkeys(mixture, 0.6),
            scores=domain_scores(rows, scales),
            routing=routing_of(rng) if method == "mole" else {},
            cost=records.Cost(
                seconds=num_samples / 60 + 9,
                train_seconds=num_samples / 60,
                eval_seconds=9.0 + seed / 10,
                samples_per_second=60 + float(rng.normal(0, 2)),
                tokens_per_second=5400.0,
                peak_bytes=1_130_000_000 + seed * 1_000_000,
                trainable=trainable,
                adapter_weights=weights,
                adapter_active=active,
            ),
        ),
        folder,
    )
    return fingerprint, config


def make_study(root, name="twice_the_samples", **changes):
    """Write study.json and its runs under `root`; returns the study's folder.

    Changes: chances {arm: chances}, seeds, num_items, comparison, unfinished {(arm, seed): (status, error)},
    scales {domain: scale}, and any key of study.json.
    """
    chances = changes.pop("chances", CHANCES)
    seeds, num_items = changes.pop("seeds", range(8)), changes.pop("num_items", 60)
    unfinished, scales = changes.pop("unfinished", {}), changes.pop("scales", {})
    trials = []
    for seed in seeds:
        for arm, chance in chances.items():
            status, error = unfinished.get((arm, seed), ("finished", ""))
            row = {"arm": arm, "seed": seed, "fingerprint": fingerprint_of(arm, seed), "status": status}
            if status == "finished":
                _, row["config"] = write_run(root, arm, seed, chance, num_items, scales)
            trials.append(row | {"error": error, "started": 1.8e9, "ended": 1.8e9 + 60})
    tree = {
        "schema_version": 1,
        "name": name,
        "hypothesis": "mole with n samples beats plain LoRA with twice the samples, at equal active rank",
        "profile": "full",
        "command": "orchestrator reproduce twice-the-samples --full",
        "created": 1_763_000_000.0,
        "comparison": COMPARISON,
        "tree": {"recipe": "pocket"},
        "trials": trials,
        "time": {"wall_seconds": 2210.0, "slots": 2, "run_seconds": 3650.0, "overhead": 0.21},
    }
    records.write_json(root / name / "study.json", tree | changes)
    return root / name


@pytest.fixture(scope="session")
def write_study():
    """The builder itself, for studies of a test's own."""
    return make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A whole finished study: 8 arms x 8 seeds x 3 domains x 60 items. Not to be changed."""
    return make_study(tmp_path_factory.mktemp("studies"))


@pytest.fixture
def rng():
    """A seeded generator."""
    return np.random.default_rng(7)
