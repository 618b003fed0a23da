"""Greedy answers of a model to the evaluation items, their scores, losses and routing; sharded over workers.

Shape letters: L layers that route, B batch, T tokens, E experts, N supervised tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workloads import routing
from workloads.adapters.base import Trace
from workloads.config import RunConfig
from workloads.data.collate import prompt_batch, train_batch
from workloads.data.pool import Pool, Sample
from workloads.evaluation.scorers import exact, normalise
from workloads.llava.build import DTYPES, Llava
from workloads.training import engine, loss


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All predictions in item order, loss sums and tokens by domain, tokens on each expert by domain and layer."""

    predictions: list[dict[str, Any]]
    losses: dict[str, float]
    routing: dict[str, list[list[float]]]


@torch.no_grad()
def answer(
    config: RunConfig,
    llava: Llava,
    trace: Trace,
    pools: Mapping[str, Pool],
    items: Mapping[str, Sequence[int]],
) -> Answered:
    """Answer `items` (domain -> pool indices) with a KV cache; every rank gets the whole result."""
    llava.model.eval()
    samples = [pools[d].sample(i) for d in sorted(items) for i in items[d]]
    world, rank = engine.world_size(), engine.rank()
    # Under ZeRO-3 every rank must generate equally often, so short ranks repeat an item.
    share = -(-len(samples) // world)
    places = [rank + k * world for k in range(share)]
    domains = sorted(items)
    sums = {d: [0.0, 0.0] for d in domains}
    experts: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for start in range(0, share, config.execution.eval_batch):
        chosen = places[start : start + config.execution.eval_batch]
        batch = [samples[min(place, len(samples) - 1)] for place in chosen]
        rows += _generate(config, llava, trace, batch)
        trace.clear()
        _teach(config, llava, trace, batch, [place < len(samples) for place in chosen], sums, experts)
        trace.clear()
    return _joined(rows, sums, experts, share, world, len(samples), domains)


def _generate(
    config: RunConfig, llava: Llava, trace: Trace, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """One prediction row for each sample."""
    batch = prompt_batch(samples, llava).to(engine.device(), DTYPES[config.optim.dtype])
    batch.begin(trace)
    tokenizer = llava.prompter.tokenizer
    model: Any = llava.model
    ids_BT = model.generate(
        **batch.inputs(),
        do_sample=False,
        max_new_tokens=config.eval.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(llava.prompter.ends),
        synced_gpus=config.execution.zero_stage == 3 and engine.world_size() > 1,
    )
    answers = ids_BT[:, batch.ids_BT.shape[1] :].tolist()
    return [_row(s, llava.prompter.decode(ids)) for s, ids in zip(samples, answers, strict=True)]


def _row(sample: Sample, raw: str) -> dict[str, Any]:
    return {
        "id": sample.id,
        "domain": sample.domain,
        "question_type": sample.question_type,
        "prompt": sample.question,
        "answer": sample.answer,
        "raw": raw,
        "normalised": normalise(raw),
        "score": exact(raw, sample.answer),
    }


def _teach(
    config: RunConfig,
    llava: Llava,
    trace: Trace,
    samples: Sequence[Sample],
    counted: Sequence[bool],
    sums: dict[str, list[float]],
    experts: dict[str, Any],
) -> None:
    """Add the gold answers' loss and all valid tokens' routing to the running sums, for samples that count."""
    batch = train_batch(samples, llava).to(engine.device(), DTYPES[config.optim.dtype])
    batch.begin(trace)
    losses_N, rows_N = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
    counted_N = torch.tensor(counted, device=rows_N.device)[rows_N]
    totals, tokens = loss.by_domain(losses_N[counted_N], rows_N[counted_N], batch, list(sums))
    for domain, total, count in zip(sums, totals, tokens, strict=True):
        sums[domain][0] += total
        sums[domain][1] += count
    if not trace.routes:
        return
    choice_LBT = torch.stack([route.choice_BT for route in trace.routes])
    num_experts = trace.routes[0].probs_BTE.shape[-1]
    load_LBE = routing.load(choice_LBT, batch.mask_BT, num_experts).double()
    for i, sample in enumerate(samples):
        if not counted[i]:
            continue
        previous = experts.get(sample.domain, torch.zeros_like(load_LBE[:, 0]))
        experts[sample.domain] = previous + load_LBE[:, i]


def _joined(
    rows: list[dict[str, Any]],
    sums: dict[str, list[float]],
    experts: dict[str, Any],
    share: int,
    world: int,
    num_items: int,
    domains: list[str],
) -> Answered:
    """All ranks' parts, repeated items dropped."""
    parts = engine.gather_objects((rows, sums, {d: t.tolist() for d, t in experts.items()}))
    ordered = [parts[k % world][0][k // world] for k in range(num_items)]
    assert len(parts[0][0]) == share
    losses, loads = {}, {}
    for d in domains:
        losses[d] = sum(part[1][d][0] for part in parts) / sum(part[1][d][1] for part in parts)
        counts = [torch.tensor(part[2][d], dtype=torch.float64) for part in parts if d in part[2]]
        if counts:
            total_LE = torch.stack(counts).sum(dim=0)
            loads[d] = (total_LE / total_LE.sum(dim=1, keepdim=True)).tolist()
    return Answered(predictions=ordered, losses=losses, routing=loads)
