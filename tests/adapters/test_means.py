"""Mean features of tasks against loops, and what they are told of: batches, workers, tasks that nobody has seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.adapters.base import Trace
from workloads.adapters.parts.means import TaskMeans
from workloads.errors import UserError

NAMES = ["general", "document", "maps"]
IMAGE = 3


class Texts:
    """An encoder whose vector of a text is a fixed list of numbers."""

    width = 2

    def vectors(self, texts):
        return torch.tensor([[float(part) for part in text.split()] for text in texts])


class Pictures:
    """A pool that has seen given images."""

    def __init__(self):
        self.seen = torch.empty(0)

    def images(self, width):
        assert self.seen.shape[1] == width
        return self.seen


def make(with_images=True):
    trace, pool = Trace(), Pictures() if with_images else None
    means = TaskMeans(NAMES, trace, Texts(), torch.device("cpu"), pool, IMAGE if with_images else 0, 0.1)
    return means, trace, pool


def show(means, trace, pool, texts, images=None, counted=True):
    """One batch of samples, as a forward pass shows it."""
    trace.begin([f"{a} {b}" for a, b in texts], ["?"] * len(texts), counted=counted)
    if pool is not None:
        pool.seen = images
    means._see(means, ())


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return dot / norm if norm else 0.0


def dyadic(*shape, seed):
    """Numbers that the sums' units and fp32 both hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator).double() / 16


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_closeness_is_the_mean_cosine_with_the_means_of_what_was_seen(num_seen, batch, with_images, seed):
    means, trace, pool = make(with_images)
    seen = {}
    for k in range(num_seen):
        means.train()
        means.start(NAMES[k])
        for part in range(2):
            texts, images = (dyadic(batch, n, seed=seed + 10 * k + part) for n in (2, IMAGE))
            show(means, trace, pool, texts.tolist(), images)
            means.note()
            means.after_step(lambda total: total)
            for text, image in zip(texts.tolist(), images.tolist(), strict=True):
                seen.setdefault(k, []).append((text, image))
    means.eval()
    texts, images = (dyadic(batch, n, seed=seed + 77) for n in (2, IMAGE))
    show(means, trace, pool, texts.tolist(), images)
    assert means.closeness_BK.dtype == torch.float64
    expected = torch.full((batch, 3), float("-inf"), dtype=torch.float64)
    for b, sample in enumerate(zip(texts.tolist(), images.tolist(), strict=True)):
        for k, rows in seen.items():
            kinds = (0, 1) if with_images else (0,)
            each = [
                cosine(sample[i], [sum(row[i][d] for row in rows) / len(rows) for d in range(len(sample[i]))])
                for i in kinds
            ]
            expected[b, k] = sum(each) / len(each)
    torch.testing.assert_close(means.closeness_BK, expected, rtol=1e-12, atol=1e-12)
    powers = [[float(torch.exp(c / 0.1)) for c in row] for row in expected]
    weights = torch.tensor([[p / sum(row) for p in row] for row in powers], dtype=torch.float64)
    torch.testing.assert_close(means.weights_BK, weights, rtol=1e-9, atol=1e-12)
    best = [max(range(num_seen), key=lambda k, row=row: float(row[k])) for row in expected]
    assert means.selected() == [NAMES[k] for k in best]


def test_sums_do_not_depend_on_how_a_batch_is_cut_or_on_workers():
    texts = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).tolist()
    images = torch.randn(4, IMAGE, generator=torch.Generator().manual_seed(1))

    def sums(cuts, workers):
        means, trace, pool = make()
        means.start("document")
        for cut in cuts:
            show(means, trace, pool, texts[cut], images[cut])
            means.note()
        means.after_step(lambda total: total * workers)
        return means.counts_K, means.sums_KW

    counts, whole = sums([slice(0, 4)], 1)
    assert counts.tolist() == [0, 4, 0]
    assert whole[1].abs().min() > 0
    assert not whole[0].any()
    for cuts, workers in (([slice(0, 1), slice(1, 4)], 1), ([slice(0, 4)], 2)):
        other, parts = sums(cuts, workers)
        assert torch.equal(other, counts * workers)
        assert (parts - whole * workers).abs().max() == 0


def test_a_batch_that_does_not_count_is_summed_as_nothing():
    means, trace, pool = make()
    means.start("maps")
    show(means, trace, pool, [(1, 2)], torch.ones(1, IMAGE), counted=False)
    means.note()
    told = []
    means.after_step(lambda total: (told.append(total), total)[1])
    assert [total.tolist() for total in told] == [[0] * 6]
    assert not means.counts_K.any()


def test_before_any_task_the_first_counts_alone_and_nothing_is_noted():
    means, trace, pool = make()
    for training in (True, False):
        means.train(training)
        show(means, trace, pool, [(1, 2), (0, 1)], torch.ones(2, IMAGE))
        means.note()
        means.after_step(lambda total: pytest.fail("nothing was noted"))
        assert means.weights_BK.tolist() == [[1.0, 0.0, 0.0]] * 2
        assert means.selected() == ["general", "general"]
    assert means.known == [0]


def test_in_training_all_weight_is_on_the_task_that_trains():
    means, trace, pool = make()
    means.start("general")
    means.start("maps")
    show(means.train(), trace, pool, [(1, 2)], torch.ones(1, IMAGE))
    assert means.weights_BK.tolist() == [[0.0, 0.0, 1.0]]
    assert means.weights_BK.dtype == means.closeness_BK.dtype
    assert means.nearest_B.tolist() == [2]
    assert means.known == [0, 2]


def test_decoding_goes_on_with_what_the_prompt_said():
    means, trace, pool = make()
    show(means, trace, pool, [(1, 2)], torch.ones(1, IMAGE))
    before = means.closeness_BK, means.weights_BK, means.nearest_B
    trace.phase = "decode"
    means._see(means, ())
    after = means.closeness_BK, means.weights_BK, means.nearest_B
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'maps'"):
        make()[0].start("map")
