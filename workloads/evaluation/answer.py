"""Greedy answers of a model to the evaluation items, their scores, losses and routing; sharded over workers.

Shape letters: L layers that route, B batch, T tokens, E experts, N supervised tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workloads import routing
from workloads.adapters.base import Trace
from workloads.config import RunConfig
from workloads.data import sources
from workloads.data.collate import Batch, prompt_batch, train_batch
from workloads.data.pool import Pool, Sample
from workloads.evaluation import predictions
from workloads.evaluation.predictions import Group
from workloads.evaluation.progress import Progress
from workloads.llava.build import DTYPES, Llava
from workloads.training import engine, loss


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All predictions in item order; by domain scores, loss per token, and by layer the share of tokens on experts."""

    predictions: list[dict[str, Any]]
    groups: dict[str, Group]
    losses: dict[str, float]
    routing: dict[str, list[list[float]]]
    # Time taken on this worker, that before a kill included.
    seconds: float


@torch.no_grad()
def answer(
    config: RunConfig,
    llava: Llava,
    trace: Trace,
    pools: Mapping[str, Pool],
    items: Mapping[str, Sequence[int]],
    folder: Path | None = None,
    selected: Callable[[], list[str]] | None = None,
) -> Answered:
    """Answer `items` (domain -> pool indices) with a KV cache; every rank gets the whole result.

    With a `folder`, which belongs to these weights, finished batches are kept there and not answered again. `selected`
    names the task that the method found for each sample of the last prompt; predictions then say it.
    """
    llava.model.eval()
    slots = [(domain, index) for domain in sorted(items) for index in items[domain]]
    world, rank, size = engine.world_size(), engine.rank(), config.execution.eval_batch
    # Under ZeRO-3 every rank must generate equally often, so short ranks repeat an item.
    share = -(-len(slots) // world)
    places = [rank + k * world for k in range(share)]
    layout = f"worker {rank} of {world}, batches of {size}"
    progress = Progress(sorted(items), folder and folder / f"answers-{rank}.jsonl", layout)
    for start in range(progress.num_batches * size, share, size):
        chosen = places[start : start + size]
        asked = [slots[min(place, len(slots) - 1)] for place in chosen]
        batch = [pools[domain].sample(index) for domain, index in asked]
        rows = _generate(config, llava, trace, batch)
        if selected is not None:
            rows = [{**row, "selected": task} for row, task in zip(rows, selected(), strict=True)]
        trace.clear()
        _teach(config, llava, trace, batch, [place < len(slots) for place in chosen], progress)
        trace.clear()
        progress.add(rows)
    return _joined(config, progress, len(slots))


def _generate(
    config: RunConfig, llava: Llava, trace: Trace, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """One prediction row for each sample."""
    batch = prompt_batch(samples, llava).to(engine.device(), DTYPES[config.optim.dtype])
    batch.begin(trace)
    tokenizer = llava.prompter.tokenizer
    model: Any = llava.model
    ids_BT = model.generate(
        **_seen(llava, batch),
        do_sample=False,
        max_new_tokens=config.eval.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(llava.prompter.ends),
        synced_gpus=config.execution.zero_stage == 3 and engine.world_size() > 1,
    )
    answers = ids_BT[:, batch.ids_BT.shape[1] :].tolist()
    return [_row(s, llava.prompter.decode(ids)) for s, ids in zip(samples, answers, strict=True)]


def _seen(llava: Llava, batch: Batch) -> dict[str, Any]:
    """The batch's inputs for `generate`; where images are cut into tiles, their tokens in the place of pixels.

    `generate` itself would make those outside of the model's forward, where ZeRO-3 has not put its newline together.
    """
    inputs: dict[str, Any] = dict(batch.inputs())
    if batch.sizes_N2 is None:
        return inputs
    model: Any = llava.model.model
    with engine.gathered([model.image_newline]):
        found = model.get_image_features(
            inputs.pop("pixel_values"), inputs.pop("image_sizes"), return_dict=True
        )
    return {**inputs, "mm_encoder_outputs": {"image": found}}


def _row(sample: Sample, raw: str) -> dict[str, Any]:
    """What was asked and said; `answer` is one reference, or the list of several."""
    return {
        "id": sample.id,
        "domain": sample.domain,
        "question_type": sample.question_type,
        "prompt": sample.question,
        "answer": sample.answers[0] if len(sample.answers) == 1 else list(sample.answers),
        "raw": raw,
    }


def _teach(
    config: RunConfig,
    llava: Llava,
    trace: Trace,
    samples: Sequence[Sample],
    counted: Sequence[bool],
    progress: Progress,
) -> None:
    """Add the gold answers' loss and all valid tokens' routing to the running sums, for samples that count."""
    batch = train_batch(samples, llava).to(engine.device(), DTYPES[config.optim.dtype])
    batch.begin(trace)
    losses_N, rows_N = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
    counted_N = torch.tensor(counted, device=rows_N.device)[rows_N]
    totals, tokens = loss.by_domain(losses_N[counted_N], rows_N[counted_N], batch, list(progress.sums))
    for sums, total, count in zip(progress.sums.values(), totals, tokens, strict=True):
        sums[0] += total
        sums[1] += count
    if not trace.routes:
        return
    choice_LBT = torch.stack([route.choice_BT for route in trace.routes])
    num_experts = trace.routes[0].probs_BTE.shape[-1]
    load_LBE = routing.load(choice_LBT, batch.mask_BT, num_experts).double().cpu()
    for i, sample in enumerate(samples):
        if counted[i]:
            progress.count(sample.domain, load_LBE[:, i])


def _joined(config: RunConfig, progress: Progress, num_items: int) -> Answered:
    """All ranks' parts, repeated items dropped, scored by each domain's scorer."""
    experts = {domain: load_LE.tolist() for domain, load_LE in progress.experts_LE.items()}
    parts = engine.gather_objects((progress.rows, progress.sums, experts))
    world = len(parts)
    ordered = [parts[k % world][0][k // world] for k in range(num_items)]
    assert all(len(rows) == -(-num_items // world) for rows, _, _ in parts)
    losses, loads, groups = {}, {}, {}
    scored: list[dict[str, Any]] = []
    source = sources.of(config.data)
    for d in progress.sums:
        losses[d] = sum(part[1][d][0] for part in parts) / sum(part[1][d][1] for part in parts)
        counts = [torch.tensor(part[2][d], dtype=torch.float64) for part in parts if d in part[2]]
        if counts:
            total_LE = torch.stack(counts).sum(dim=0)
            loads[d] = (total_LE / total_LE.sum(dim=1, keepdim=True)).tolist()
        rows = [row for row in ordered if row["domain"] == d]
        groups[d], kept = predictions.scored(rows, source.scorer(d))
        scored += kept
    return Answered(predictions=scored, groups=groups, losses=losses, routing=loads, seconds=progress.seconds)
