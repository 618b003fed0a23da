"""A stream as the batches of one worker: which samples it sees in which step, in which micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from workloads.config import RunConfig
from workloads.data.collate import Batch, train_batch
from workloads.data.mixture import Slot
from workloads.data.pool import Pool, Sample
from workloads.llava.build import DTYPES, Llava
from workloads.training import engine


@dataclass(frozen=True, kw_only=True)
class Batches:
    """This rank's share of every global batch; the same whenever it is asked for."""

    config: RunConfig
    llava: Llava
    pools: Mapping[str, Pool]
    stream: Sequence[Slot]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one pass over the stream."""
        return -(-len(self.stream) // self.config.optim.global_batch)

    def of(self, step: int) -> list[Batch]:
        """This rank's share of the step's samples, in micro-batches; ranks take turns sample by sample.

        Every rank makes the same number of micro-batches; where the last step has too few samples, a rank
        repeats one of them without labels, which changes no gradient.
        """
        size, micro = self.config.optim.global_batch, self.config.execution.micro_batch
        slots = self.stream[step * size : (step + 1) * size]
        world, rank = engine.world_size(), engine.rank()
        longest = -(-len(slots) // world)
        mine = [sample_of(self.pools, slot) for slot in slots[rank::world]]
        batches = [train_batch(mine[i : i + micro], self.llava) for i in range(0, len(mine), micro)]
        missing = -(-longest // micro) - len(batches)
        batches += [self._silent(slots[0]) for _ in range(missing)]
        return [batch.to(engine.device(), DTYPES[self.config.optim.dtype]) for batch in batches]

    def _silent(self, slot: Slot) -> Batch:
        """A batch that takes part in every collective and adds nothing."""
        return train_batch([sample_of(self.pools, slot)], self.llava).silent()


def sample_of(pools: Mapping[str, Pool], slot: Slot) -> Sample:
    """The sample at a place of a stream, decoded."""
    sample = pools[slot.domain].sample(slot.index)
    return replace(sample, task=slot.task) if slot.task else sample
