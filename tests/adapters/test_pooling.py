"""Which tokens a router that decides once per sample sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.adapters.base import Trace
from workloads.adapters.parts.pooling import ROUTER_POOLS, Pool, image_means, pooled_tokens, prompt_mask


def slow_place(mask, image, pool):
    """The chosen token of one sample, found by walking along it."""
    valid = [t for t, ok in enumerate(mask) if ok]
    if pool == "last_prompt":
        return valid[-1]
    if pool == "first_after_image":
        seen = False
        for t in range(len(mask)):
            if seen and mask[t] and not image[t]:
                return t
            seen = seen or image[t]
    return valid[0]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(ROUTER_POOLS), st.integers(1, 4), st.integers(1, 7), st.integers(0, 10**6))
def test_the_pooled_tokens_are_those_found_by_walking(pool, B, T, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, int(torch.randint(T, (1,), generator=generator))] = True
    image = mask & (torch.rand(B, T, generator=generator) < 0.4)
    chosen = pooled_tokens(mask, image, pool)
    for b in range(B):
        if pool == "mean_valid":
            assert chosen[b].tolist() == mask[b].tolist()
        else:
            place = slow_place(mask[b].tolist(), image[b].tolist(), pool)
            assert chosen[b].tolist() == [t == place for t in range(T)]


def test_the_prompt_ends_where_the_trace_says_whatever_side_is_padded():
    trace = Trace()
    trace.token_mask_BT = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    assert torch.equal(prompt_mask(trace), trace.token_mask_BT)
    trace.prompt_lengths = (3, 1)
    assert prompt_mask(trace).int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_an_image_is_the_mean_of_its_patches_and_images_go_to_the_sample_that_shows_them():
    patches = torch.randn(3, 2, 5, dtype=torch.float64)
    # Sample 0 shows one image, sample 1 none, sample 2 two.
    image = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    means = image_means(patches, image)
    torch.testing.assert_close(means[0], (patches[0, 0] + patches[0, 1]) / 2)
    assert means[1].abs().max() == 0
    torch.testing.assert_close(means[2], (patches[1, 0] + patches[1, 1] + patches[2, 0] + patches[2, 1]) / 4)


def test_images_are_what_enters_the_projector(tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    pool = Pool(trace, "first", model)
    trace.watch(model)
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    torch.testing.assert_close(pool.images(8), seen[0].mean(dim=1).detach())
    model(input_ids=batch["input_ids"][:, 5:])
    assert pool.images(8).shape == (2, 8)
    assert pool.images(8).abs().max() == 0


def test_an_image_in_the_padding_belongs_to_no_sample(tiny_llava, batch):
    """Batches of texts alone have one there."""
    model, trace = tiny_llava(), Trace()
    pool = Pool(trace, "first_after_image", model)
    trace.watch(model)
    ids, mask = torch.full((2, 12), 7), torch.ones(2, 12, dtype=torch.long)
    mask[:, :2], ids[:, :2] = 0, 3
    model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"][:1])
    assert pool.images(8).shape == (2, 8)
    assert pool.images(8).abs().max() == 0
    x = torch.randn(2, 12, 5, dtype=torch.float64)
    torch.testing.assert_close(pool(x), x[:, 2])


@pytest.mark.parametrize("pool", ROUTER_POOLS)
def test_padding_on_either_side_is_never_pooled(pool):
    image, mask = torch.tensor([[0, 1, 1, 0, 0, 0]]).bool(), torch.ones(1, 6).bool()
    expected = pooled_tokens(mask, image, pool)
    for left, right in ((2, 0), (0, 3)):
        wide = [torch.nn.functional.pad(x, (left, right)) for x in (mask, image)]
        chosen = pooled_tokens(*wide, pool)
        assert torch.equal(chosen[:, left : left + 6], expected)
        assert int(chosen.sum()) == int(expected.sum())


@pytest.mark.parametrize("pool", ROUTER_POOLS)
def test_the_pooled_vector_is_the_mean_of_the_chosen_tokens(pool, tiny_llava, batch):
    model, trace = tiny_llava(), Trace()
    pooled = Pool(trace, pool, model)
    trace.watch(model)
    trace.prompt_lengths = (8, 7)
    model(**batch)
    x = torch.randn(2, 12, 5, dtype=torch.float64)
    # Images are tokens 1 to 4 of both samples.
    places = {"first": [0], "first_after_image": [5]}
    for b, length in enumerate(trace.prompt_lengths):
        chosen = places.get(pool, [length - 1] if pool == "last_prompt" else range(length))
        total = torch.zeros(5, dtype=torch.float64)
        for t in chosen:
            total = total + x[b, t]
        torch.testing.assert_close(pooled(x)[b], total / len(chosen), rtol=1e-12, atol=1e-12)
