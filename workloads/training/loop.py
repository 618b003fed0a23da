"""The training loop: one pass over the stream, one optimizer step per global batch.

The loss is the sum over all supervised tokens of the global batch divided by their number, over all workers and
accumulation steps; a method's loss terms are means over the global batch's samples. So 1, 2 or 4 workers and any
micro-batch size give the same curve up to rounding, unless the method says that the layout matters.

Shape letters: N supervised tokens.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workloads.adapters.base import Attached, Trace
from workloads.config import RunConfig
from workloads.data.collate import Batch, train_batch
from workloads.data.mixture import Slot
from workloads.data.pool import Pool, Sample
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.llava.build import DTYPES, Llava
from workloads.training import checkpoint, engine, loss
from workloads.training.optim import cosine_with_warmup
from workloads.training.tally import Tally

Emit = Callable[[Mapping[str, float | int | str]], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the loop leaves: loss by domain over the last tenth of the steps, and shares over the whole stream."""

    train_loss: dict[str, float]
    sample_shares: dict[str, float]
    token_shares: dict[str, float]
    num_steps: int
    num_resumes: int
    seconds: float
    samples_per_second: float
    tokens_per_second: float


class Loop:
    """Trains one attached model over one stream; every rank runs the same loop over its share of each batch."""

    def __init__(
        self,
        config: RunConfig,
        llava: Llava,
        attached: Attached,
        trace: Trace,
        trained: engine.Engine,
        pools: Mapping[str, Pool],
        stream: Sequence[Slot],
    ) -> None:
        self.config, self.llava, self.attached, self.trace = config, llava, attached, trace
        self.trained, self.pools, self.stream = trained, pools, stream
        self.num_steps = -(-len(stream) // config.optim.global_batch)
        domains = sorted(pools)
        self.tallies = {name: Tally(domains=domains) for name in ("window", "tail", "total")}
        execution = config.execution
        self.layout = (
            f"run {fingerprint(config)}, {execution.workers} worker(s), ZeRO stage {execution.zero_stage}"
        )
        self.dtype = DTYPES[config.optim.dtype]

    def run(self, folder: Path, emit: Emit) -> Trained:
        """Train from the newest checkpoint under `folder`, or from the start, to the end of the stream."""
        start, num_resumes, seconds = 0, 0, 0.0
        if path := checkpoint.latest(folder):
            position = checkpoint.load_position(path, self.trained, self.layout)
            start, num_resumes, seconds = position.step, position.num_resumes, position.seconds
            self.tallies = {name: Tally.from_json(text) for name, text in position.tallies.items()}
        execution = self.config.execution
        mark = time.monotonic()
        began = mark - seconds
        self.trained.engine.train()
        for step in range(start, self.num_steps):
            self._step(step)
            done = step + 1
            if done % execution.report_every == 0 or done == self.num_steps:
                self._report(done, time.monotonic() - mark, emit)
                mark = time.monotonic()
            # The last one is what a killed evaluation goes on from.
            is_last = done == self.num_steps
            if execution.checkpoint_every and (done % execution.checkpoint_every == 0 or is_last):
                tallies = {name: tally.to_json() for name, tally in self.tallies.items()}
                position = checkpoint.Position(
                    step=done, tallies=tallies, num_resumes=num_resumes, seconds=time.monotonic() - began
                )
                checkpoint.save(folder, self.llava.model, self.attached, self.trained, position, self.layout)
        return self._result(num_resumes, time.monotonic() - began)

    def _step(self, step: int) -> None:
        """One global batch: this rank's micro-batches, backward each, then the optimizer."""
        batches = self._batches(step)
        num_tokens, num_samples = self._global_counts(batches)
        seen = Tally(domains=self.tallies["window"].domains)
        for batch in batches:
            batch.begin(self.trace)
            losses_N, rows_N = loss.token_losses(self.trained.forward, batch)
            total = losses_N.sum() / num_tokens
            for name, term in self.attached.losses(self.trace).items():
                total = total + term * (len(batch.samples) / num_samples)
                seen.add_term(name, float(term.detach()), len(batch.samples))
            self.trained.backward(total)
            self.trace.clear()
            sums, tokens = loss.by_domain(losses_N, rows_N, batch, seen.domains)
            seen.add(
                sums,
                tokens,
                [s.domain for s in batch.samples],
                int(batch.mask_BT.sum()) if batch.samples else 0,
            )
        self.trained.step(cosine_with_warmup(step, self.num_steps, self.config.optim.warmup_ratio))
        self.attached.after_step(engine.sum_tensor)
        self.tallies["window"].merge(seen)
        self.tallies["total"].merge(seen)
        if step >= self.num_steps - max(1, self.num_steps // 10):
            self.tallies["tail"].merge(seen)

    def _batches(self, step: int) -> list[Batch]:
        """This rank's share of the step's samples, in micro-batches; ranks take turns sample by sample.

        Every rank makes the same number of micro-batches; where the last step has too few samples, a rank
        repeats one of them without labels, which changes no gradient.
        """
        size, micro = self.config.optim.global_batch, self.config.execution.micro_batch
        slots = self.stream[step * size : (step + 1) * size]
        world, rank = engine.world_size(), engine.rank()
        longest = -(-len(slots) // world)
        mine = [self._sample(slot) for slot in slots[rank::world]]
        batches = [train_batch(mine[i : i + micro], self.llava) for i in range(0, len(mine), micro)]
        missing = -(-longest // micro) - len(batches)
        batches += [self._silent(slots[0]) for _ in range(missing)]
        return [batch.to(engine.device(), self.dtype) for batch in batches]

    def _sample(self, slot: Slot) -> Sample:
        return self.pools[slot.domain].sample(slot.index)

    def _silent(self, slot: Slot) -> Batch:
        """A batch that takes part in every collective and adds nothing."""
        return train_batch([self._sample(slot)], self.llava).silent()

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Supervised tokens and samples of the step over all ranks."""
        tokens = sum(loss.num_supervised(batch) for batch in batches)
        samples = sum(len(batch.samples) for batch in batches)
        num_tokens, num_samples = engine.reduce_sum([float(tokens), float(samples)])
        return num_tokens, num_samples

    def _report(self, done: int, seconds: float, emit: Emit) -> None:
        window = self.tallies["window"].reduced()
        if not all(math.isfinite(value) for value in window.metrics().values()):
            raise UserError(f"optim.lr: {self.config.optim.lr}: training diverged at step {done}; lower it")
        rate = cosine_with_warmup(done - 1, self.num_steps, self.config.optim.warmup_ratio)
        emit(
            {
                "event": "train",
                "step": done,
                "num_steps": self.num_steps,
                **window.metrics(),
                "lr": self.config.optim.lr * rate,
                "samples_per_second": sum(window.samples) / max(seconds, 1e-9),
                "tokens_per_second": window.all_tokens / max(seconds, 1e-9),
            }
        )
        self.tallies["window"].clear()

    def _result(self, num_resumes: int, seconds: float) -> Trained:
        tail, total = self.tallies["tail"].reduced(), self.tallies["total"].reduced()
        num_samples, num_tokens = sum(total.samples), sum(total.tokens)
        rows = list(zip(total.domains, total.samples, total.tokens, strict=True))
        return Trained(
            train_loss=tail.losses(),
            sample_shares={domain: samples / num_samples for domain, samples, _ in rows},
            token_shares={domain: tokens / num_tokens for domain, _, tokens in rows},
            num_steps=self.num_steps,
            num_resumes=num_resumes,
            seconds=seconds,
            samples_per_second=num_samples / max(seconds, 1e-9),
            tokens_per_second=total.all_tokens / max(seconds, 1e-9),
        )
