"""VCE against loops over patches, heads, levels and points; its place in a LLaVA."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.minimal import QUESTIONS, TASKS, cases, draw, drawn, loss_of, make_config
from workloads import adapters
from workloads.adapters import lora
from workloads.adapters.base import Trace
from workloads.adapters.parts.iso import empty
from workloads.errors import UserError
from workloads.llava import vce


def read_bilinear(grid, x, y):
    """The value (C) of `grid` (S, S, C), rows first, at column x and row y; 0 outside."""
    side, total = len(grid), torch.zeros_like(grid[0, 0])
    left, top = math.floor(float(x.detach())), math.floor(float(y.detach()))
    for column in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= column < side and 0 <= row < side:
                total = total + (1 - (x - column).abs()) * (1 - (y - row).abs()) * grid[row, column]
    return total


def slow_attention(values, offsets, weights):
    """Patch by patch, head by head, level by level, point by point."""
    levels, images, patches, width = values.shape
    heads, points = weights.shape[2], weights.shape[4]
    side, each = math.isqrt(patches), width // heads
    rows = []
    for b in range(images):
        for p in range(patches):
            parts = []
            for h in range(heads):
                total = torch.zeros(each, dtype=values.dtype)
                for level in range(levels):
                    grid = values[level, b, :, h * each : (h + 1) * each].reshape(side, side, each)
                    for k in range(points):
                        x = p % side + offsets[b, p, h, level, k, 0]
                        y = p // side + offsets[b, p, h, level, k, 1]
                        total = total + weights[b, p, h, level, k] * read_bilinear(grid, x, y)
                parts.append(total)
            rows.append(torch.cat(parts))
    return torch.stack(rows).reshape(images, patches, width)


def slow_norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def slow_vce(cues, anchor, levels):
    """The module's equation, sample by sample."""
    images, patches, _ = anchor.shape
    shape = (images, patches, cues.heads, len(levels), cues.points)
    query = slow_norm(anchor, cues.query_norm)
    offsets = (query @ cues.offsets.weight.T + cues.offsets.bias).reshape(*shape, 2)
    scores = (query @ cues.weights.weight.T + cues.weights.bias).reshape(*shape[:3], -1).exp()
    weights = (scores / scores.sum(-1, keepdim=True)).reshape(shape)
    values = torch.stack(
        [slow_norm(x, cues.value_norm) @ cues.value.weight.T + cues.value.bias for x in levels]
    )
    return anchor + slow_attention(values, offsets, weights) @ cues.output.weight.T + cues.output.bias


def make(levels, heads, points, width, seed):
    torch.manual_seed(seed)
    cues = vce.VisualCues(levels, heads, points, width, torch.zeros(1, dtype=torch.float64))
    for weight in cues.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return cues


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_it_equals_a_loop_forward_and_backward(num_levels, heads, points, side, images, seed):
    width = 4 * heads
    cues = make([-1 - i for i in range(num_levels)], heads, points, width, seed)
    anchor = torch.randn(images, side**2, width, dtype=torch.float64, requires_grad=True)
    levels = [torch.randn_like(anchor).requires_grad_() for _ in range(num_levels)]
    out, slow = cues(anchor, levels), slow_vce(cues, anchor, levels)
    torch.testing.assert_close(out, slow, rtol=1e-9, atol=1e-10)
    probe = torch.randn_like(out)
    inputs = [anchor, *levels, *cues.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    theirs = torch.autograd.grad((slow * probe).sum(), inputs, allow_unused=True)
    for a, b, given_ in zip(ours, theirs, inputs, strict=True):
        # Where no point falls on the grid the loop never touches the values.
        torch.testing.assert_close(a, torch.zeros_like(given_) if b is None else b, rtol=1e-7, atol=1e-9)


def test_points_far_outside_of_the_image_read_nothing():
    values = torch.randn(2, 1, 9, 4, dtype=torch.float64)
    weights = torch.ones(1, 9, 2, 2, 3, dtype=torch.float64)
    found = vce.deformable_attention(
        values, torch.full((1, 9, 2, 2, 3, 2), 77.0, dtype=torch.float64), weights
    )
    assert found.abs().max() == 0


def test_without_offsets_every_patch_reads_itself():
    values = torch.randn(1, 2, 16, 6, dtype=torch.float64)
    weights = torch.ones(2, 16, 3, 1, 1, dtype=torch.float64)
    found = vce.deformable_attention(values, torch.zeros(2, 16, 3, 1, 1, 2, dtype=torch.float64), weights)
    torch.testing.assert_close(found, values[0], rtol=1e-12, atol=1e-12)


def test_a_fresh_head_looks_in_its_own_direction_and_further_with_every_point():
    cues = vce.VisualCues([-1, -2], 4, 3, 8, torch.zeros(1, dtype=torch.float64))
    offsets = cues.offsets(torch.randn(1, 8, dtype=torch.float64)).reshape(4, 2, 3, 2)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(3):
            wanted = torch.tensor(direction, dtype=torch.float64) * (point + 1)
            torch.testing.assert_close(offsets[head, :, point], wanted.expand(2, 2), rtol=0, atol=1e-12)


def test_half_precision_locates_in_fp32():
    cues = vce.VisualCues([-1, -2], 2, 2, 8, torch.zeros(1, dtype=torch.bfloat16))
    torch.nn.init.normal_(cues.output.weight)
    anchor = torch.randn(1, 576, 8, dtype=torch.bfloat16)
    exact = cues.float()(anchor.float(), [anchor.float()] * 2)
    rounded = cues.bfloat16()(anchor, [anchor] * 2)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.fixture
def llava(tiny_llava):
    """The tiny LLaVA with VCE over all of its three levels."""
    model = tiny_llava()
    trace = Trace()
    lora.attach(model, lora.Config(rank=2), trace)
    trace.watch(model)
    vce.attach(model, [-1, -2, -3], heads=2, points=2)
    return model


def test_training_starts_at_the_base(llava, tiny_llava, batch):
    assert torch.equal(llava(**batch).logits, tiny_llava()(**batch).logits)


def test_the_projector_reads_the_anchor_plus_what_is_found_on_the_chosen_levels(llava, batch):
    cues, projector = llava.model.visual_cues, llava.model.multi_modal_projector
    for weight in cues.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    states = llava.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    levels = [states[i][:, 1:] for i in (-1, -2, -3)]
    hidden = projector.linear_1(slow_vce(cues, levels[0], levels))
    wanted = projector.linear_2(projector.act(hidden))
    found = llava.model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), wanted, rtol=1e-8, atol=1e-9)


def test_every_weight_of_it_learns_and_the_tower_does_not(llava, batch):
    cues = llava.model.visual_cues
    for weight in cues.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    llava(**batch).logits.square().sum().backward()
    for name, weight in cues.named_parameters():
        assert float(weight.grad.abs().max()) > 0, name
    assert all(weight.grad is None for weight in llava.model.vision_tower.parameters())


def test_it_is_saved_and_loaded_with_the_adapter(tiny_llava, batch, tmp_path):
    model = tiny_llava()
    attached = lora.attach(model, lora.Config(rank=2), Trace())
    settings_ = vce.attach(model, [-1, -3], heads=4, points=1)
    attached = replace(attached, exported={**attached.exported, "vce": settings_})
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    adapters.save(tmp_path, adapters.weights_of(model, attached), lora.Config(rank=2), attached, "tiny")
    other = tiny_llava()
    restored, _ = adapters.load(other, tmp_path)
    assert other.model.visual_cues.levels == (-1, -3)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    with pytest.raises(UserError, match="VCE"):
        adapters.export(tmp_path / "plain", other, restored, "tiny")


@pytest.mark.parametrize("case", cases())
def test_it_combines_with_every_method(case, tiny_llava, batch, tmp_path):
    config = make_config(case, tmp_path / "files", tiny_llava)
    model, trace, described = drawn(tiny_llava, config)
    before = model(**batch).logits
    settings_ = vce.attach(model, [-1, -2], heads=2, points=2)
    assert torch.equal(model(**batch).logits, before)
    described = replace(described, exported={**described.exported, "vce": settings_})
    draw(model, {name for name, _ in model.named_parameters() if "visual_cues" in name}, seed=4)
    trace.clear()
    loss_of(model.train(), trace, described, batch).backward()
    for name, weight in model.model.visual_cues.named_parameters():
        assert float(weight.grad.abs().max()) > 0, name
    adapters.save(tmp_path / "saved", adapters.weights_of(model, described), config, described, "tiny")
    other = tiny_llava()
    _, again = adapters.load(other, tmp_path / "saved")
    again.begin(QUESTIONS, TASKS)
    assert torch.equal(other(**batch).logits, model.eval()(**batch).logits)


def test_weights_at_clip_large_are_2_89_million():
    cues = vce.VisualCues([-2, -8, -14, -20], 16, 4, 1024, torch.zeros(1, device="meta"))
    projections, offsets, weights = (
        2 * (1024 * 1024 + 1024),
        (1024 + 1) * 16 * 4 * 4 * 2,
        (1024 + 1) * 16 * 4 * 4,
    )
    norms = 2 * 2 * 1024
    total = sum(w.numel() for w in cues.parameters())
    assert total == projections + offsets + weights + norms
    assert round(total / 1e6, 2) == 2.89


@pytest.mark.parametrize(
    ("levels", "heads", "points", "expected"),
    [
        ([], 2, 2, "vce_levels"),
        ([-2, -1], 2, 2, "the projector reads, -1"),
        ([-1, -4], 2, 2, "levels -1 to -3"),
        ([-1, -1], 2, 2, "once"),
        ([-1, 0], 2, 2, "count from the end"),
        ([-1], 3, 2, "vce_heads: 3"),
        ([-1], 0, 2, "vce_heads: 0"),
        ([-1], 2, 0, "vce_points: 0"),
    ],
)
def test_settings_that_do_not_fit_are_told(levels, heads, points, expected, tiny_llava):
    with pytest.raises(UserError, match=expected):
        vce.attach(tiny_llava(), levels, heads, points)


def test_it_fits_llava_on_the_meta_device(tiny_llava):
    model = empty(tiny_llava().config)
    assert vce.attach(model, [-1], 2, 1)["levels"] == [-1]
