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
from workloads.data.collate import Batch
from workloads.data.mixture import Slot
from workloads.data.pool import Pool
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.llava.build import Llava
from workloads.training import checkpoint, engine, loss
from workloads.training.batches import Batches
from workloads.training.optim import cosine_with_warmup
from workloads.training.past import NO_PAST, Past
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
        past: Past = NO_PAST,
    ) -> None:
        self.config, self.llava, self.attached, self.trace = config, llava, attached, trace
        self.trained, self.past = trained, past
        self.batches = Batches(config=config, llava=llava, pools=pools, stream=stream)
        self.num_steps = self.batches.num_steps
        domains = sorted({slot.domain for slot in stream})
        self.tallies = {name: Tally(domains=domains) for name in ("window", "tail", "total")}
        execution = config.execution
        self.layout = (
            f"run {fingerprint(config)}, {execution.workers} worker(s), ZeRO stage {execution.zero_stage}"
        )

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
        batches = self.batches.of(step)
        num_tokens, num_samples = self._global_counts(batches)
        seen = Tally(domains=self.tallies["window"].domains)
        for number, batch in enumerate(batches):
            batch.begin(self.trace)
            losses_N, rows_N = loss.token_losses(self.trained.forward, batch)
            total = losses_N.sum() / num_tokens
            for name, term in self.attached.losses(self.trace).items():
                total = total + term * (len(batch.samples) / num_samples)
                seen.add_term(name, float(term.detach()), len(batch.samples))
            share = len(batch.samples) / num_samples
            for name, part in self.past.losses(step, number, share, num_tokens).items():
                total = total + part
                seen.add_term(name, float(part.detach()) * num_samples, 1)
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
