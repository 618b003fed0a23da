"""Plain LoRA against a loop and against PEFT."""

import json

import pytest
import torch
from torch import nn

from workloads import adapters
from workloads.adapters import lora
from workloads.adapters.base import LoRALinear, Trace
from workloads.errors import UserError


def randomise(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3


def slow_lora(x, W, A, B, scale):
    """One output at a time: W x + scale * sum_r B[o, r] * (A[r] . x)."""
    out = []
    for token in x:
        row = []
        for o in range(W.shape[0]):
            value = (W[o] * token).sum()
            for r in range(A.shape[0]):
                value = value + scale * B[o, r] * (A[r] * token).sum()
            row.append(value)
        out.append(torch.stack(row))
    return torch.stack(out)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 16.0), (5, 2.5)])
def test_lora_linear_equals_a_loop_forward_and_backward(rank, alpha):
    torch.manual_seed(rank)
    layer = LoRALinear(nn.Linear(6, 4, bias=False).double(), rank, alpha, dropout=0.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights = [layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight]
    out, slow = layer(x), slow_lora(x, *weights, alpha / rank)
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), [x, *weights])
    theirs = torch.autograd.grad((slow * probe).sum(), [x, *weights])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_saved_lora_loads_in_peft_with_equal_logits(tiny_llava, batch, tmp_path):
    from peft import PeftModel

    model = tiny_llava()
    config = lora.Config(rank=3, alpha=5.0)
    attached = lora.attach(model, config, Trace())
    model.model.multi_modal_projector.requires_grad_(True)
    randomise(model)
    adapters.save(tmp_path, adapters.weights_of(model, attached), config, attached, "pocket")
    with torch.no_grad():
        ours = model(**batch).logits
        theirs = PeftModel.from_pretrained(tiny_llava(), tmp_path).double().eval()(**batch).logits
        base = tiny_llava()(**batch).logits
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_adapted_linears_are_those_of_the_language_model_alone(tiny_llava):
    model = tiny_llava()
    lora.attach(model, lora.Config(rank=1), Trace())
    paths = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(paths) == 2 * 7
    assert all(path.startswith("model.language_model.layers.") for path in paths)


def test_targets_choose_the_linears_and_unknown_ones_name_the_nearest(tiny_llava):
    model = tiny_llava()
    lora.attach(model, lora.Config(rank=1, targets=["q_proj", "v_proj"]), Trace())
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2 * 2
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        lora.Config(rank=1, targets=["qproj"]).check()


def test_adapter_config_states_method_and_schema(tiny_llava, tmp_path):
    model = tiny_llava()
    config = lora.Config(rank=2)
    attached = lora.attach(model, config, Trace())
    adapters.save(tmp_path, adapters.weights_of(model, attached), config, attached, "pocket")
    tree = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert tree["schema_version"] == 1
    assert tree["method"]["name"] == "lora"
    assert tree["r"] == 2
