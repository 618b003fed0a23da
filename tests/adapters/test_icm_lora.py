"""ICM-LoRA's autoencoder and its LoRAs: sizes, exact flattening, and a generated LoRA as the method."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.minimal import make_generator
from workloads import adapters
from workloads.adapters import icm_lora
from workloads.adapters.base import Trace
from workloads.errors import UserError

SMALL = {"channels": (3, 4), "kernel": 3, "latent": 5}


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6), st.integers(0, 99))
def test_unflattened_is_what_was_flattened_to_the_bit_padding_or_not(shapes, seed):
    torch.manual_seed(seed)
    weights = {f"layer.{i}.lora_{'AB'[i % 2]}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    layout = icm_lora.layout_of(dict(reversed(weights.items())))
    numbers = layout.flatten(weights)
    assert len(numbers) == sum(a * b for a, b in shapes)
    for given_ in (numbers, torch.cat([numbers, torch.full((7,), torch.nan)])):
        back = layout.unflatten(given_)
        assert set(back) == set(weights)
        assert all(torch.equal(back[name], weights[name]) for name in weights)


def slow_convolution(x, weight, bias, padding):
    """One output at a time, stride 2: x (C, N), weight (O, C, K)."""
    size = (x.shape[1] + 2 * padding - weight.shape[2]) // 2 + 1
    rows = []
    for o in range(len(weight)):
        for i in range(size):
            total = bias[o]
            for c in range(len(x)):
                for k in range(weight.shape[2]):
                    at = 2 * i + k - padding
                    if 0 <= at < x.shape[1]:
                        total = total + weight[o, c, k] * x[c, at]
            rows.append(total)
    return torch.stack(rows).reshape(len(weight), size)


def slow_transposed(x, weight, bias, padding, size):
    """The adjoint of a stride-2 convolution: every input adds to K outputs; x (C, M), weight (C, O, K)."""
    rows = [[bias[o] for _ in range(size)] for o in range(weight.shape[1])]
    for c in range(len(x)):
        for i in range(x.shape[1]):
            for o in range(weight.shape[1]):
                for k in range(weight.shape[2]):
                    at = 2 * i + k - padding
                    if 0 <= at < size:
                        rows[o][at] = rows[o][at] + weight[c, o, k] * x[c, i]
    return torch.stack([torch.stack(row) for row in rows])


def test_the_autoencoder_equals_loops_forward_and_backward():
    torch.manual_seed(0)
    cvae = icm_lora.CVAE(icm_lora.Shape(num_numbers=7, condition=3, **SMALL)).double()
    numbers = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    latent = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def leaky(x):
        return torch.where(x > 0, x, 0.1 * x)

    def slow():
        codes, outputs = [], []
        for row, given_, z in zip(numbers, condition, latent, strict=True):
            x = row.unsqueeze(0)
            for layer in cvae.down:
                x = leaky(slow_convolution(x, layer.weight, layer.bias, 1))
            features = torch.cat([x.reshape(-1), given_])
            codes.append(cvae.to_latent.weight @ features + cvae.to_latent.bias)
            y = (cvae.from_latent.weight @ torch.cat([z, given_]) + cvae.from_latent.bias).reshape(4, 2)
            for layer in cvae.up:
                y = slow_transposed(leaky(y), layer.weight, layer.bias, 1, 2 * y.shape[1])
            outputs.append(y[0])
        return torch.stack(codes), torch.stack(outputs)

    mean, log_variance = cvae.encode(numbers, condition)
    ours = (torch.cat([mean, log_variance], dim=1), cvae.decode(latent, condition))
    theirs = slow()
    inputs = [numbers, condition, latent, *cvae.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    ours_grads = torch.autograd.grad(sum(x.square().sum() for x in ours), inputs)
    theirs_grads = torch.autograd.grad(sum(x.square().sum() for x in theirs), inputs)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_papers_autoencoder_pads_to_4096_and_gives_as_many_numbers_back():
    shape = icm_lora.Shape(num_numbers=5000, condition=6)
    assert shape.padded == 8192
    assert len(shape.channels) == 12
    with torch.device("meta"):
        cvae = icm_lora.CVAE(shape)
        mean, _ = cvae.encode(torch.zeros(2, 8192), torch.zeros(2, 6))
        assert mean.shape == (2, 64)
        assert cvae.decode(mean, torch.zeros(2, 6)).shape == (2, 8192)


def test_a_saved_generator_draws_the_same_lora_for_a_seed(tiny_llava, tmp_path):
    made = make_generator(tmp_path, tiny_llava())
    read = icm_lora.load_generator(tmp_path / "generator")
    first, again, other = read.draw("document", 3), made.draw("document", 3), read.draw("document", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(UserError, match="did you mean 'document'"):
        read.draw("documents", 0)


def test_the_attached_model_is_the_base_with_the_generated_lora_and_trains_nothing(
    tiny_llava, batch, tmp_path
):
    generator = make_generator(tmp_path, tiny_llava())
    config = icm_lora.Config(generator=str(tmp_path / "generator"), task="general", draw=1)
    model, plain = tiny_llava(), tiny_llava()
    attached = icm_lora.attach(model, config, Trace())
    weights = generator.draw("general", 1)
    with torch.no_grad():
        for path in {name.rsplit(".lora_", 1)[0] for name in weights}:
            linear = plain.get_submodule(path)
            A, B = weights[f"{path}.lora_A.weight"].double(), weights[f"{path}.lora_B.weight"].double()
            linear.weight += 3.0 / 2 * B @ A
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-9, atol=1e-9)
    assert not any(w.requires_grad for w in model.parameters())
    assert attached.state == set(weights)


def test_what_is_saved_is_a_plain_lora_that_needs_no_generator(tiny_llava, batch, tmp_path):
    make_generator(tmp_path, tiny_llava())
    config = icm_lora.Config(generator=str(tmp_path / "generator"), task="general")
    model, other = tiny_llava(), tiny_llava()
    attached = icm_lora.attach(model, config, Trace())
    weights = {name: w for name, w in model.named_parameters() if name in attached.state}
    adapters.save(tmp_path / "saved", weights, config, attached, "tiny")
    for path in (tmp_path / "generator").iterdir():
        path.unlink()
    adapters.load(other, tmp_path / "saved")
    assert adapters.settings(tmp_path / "saved")["method"]["name"] == "lora"
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_generator_for_another_model_is_refused(tiny_llava, tmp_path):
    make_generator(tmp_path, tiny_llava())
    tree = json.loads((tmp_path / "generator" / "generator.json").read_text())
    tree["adapter"]["method"]["rank"] = 3
    (tmp_path / "generator" / "generator.json").write_text(json.dumps(tree))
    config = icm_lora.Config(generator=str(tmp_path / "generator"), task="general")
    with pytest.raises(UserError, match="for LoRAs of this model"):
        icm_lora.attach(tiny_llava(), config, Trace())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": "general"}, "adapter.generator"),
        ({"generator": "x"}, "adapter.task"),
        ({"generator": "x", "task": "y", "draw": -1}, "adapter.draw: -1"),
    ],
)
def test_mistakes_are_told(fields, expected):
    with pytest.raises(UserError, match=expected):
        icm_lora.Config(**fields).check()


def test_a_folder_without_a_generator_is_told(tiny_llava, tmp_path):
    config = icm_lora.Config(generator=str(tmp_path), task="general")
    with pytest.raises(UserError, match="holds no generator"):
        icm_lora.attach(tiny_llava(), config, Trace())
