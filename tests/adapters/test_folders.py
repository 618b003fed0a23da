"""Reading plain LoRAs: PEFT's folders as PEFT reads them, and one line for everything that is wrong."""

import json

import pytest
import torch

from tests.adapters.folder_tools import add_plain, peft_folder, write_folder
from workloads.adapters.parts.folders import fill, read_lora
from workloads.errors import UserError

Q = "model.language_model.layers.0.self_attn.q_proj"


def pair(path=Q, rank=2, width=16):
    return {
        f"{path}.lora_A.weight": torch.ones(rank, width),
        f"{path}.lora_B.weight": torch.ones(width, rank),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 2, "init_lora_weights": "gaussian"},
        {
            "r": 2,
            "lora_alpha": 4,
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {r"layers\.1\..*v_proj": 9},
        },
    ],
    ids=lambda s: "-".join(s),
)
def test_what_peft_saved_gives_pefts_logits(settings, tiny_llava, batch, tmp_path):
    peft = peft_folder(tiny_llava(), tmp_path, **settings)
    lora = read_lora(tmp_path, "adapter", tiny_llava())
    with torch.no_grad():
        theirs = peft(**batch).logits
        ours = add_plain(tiny_llava(), lora.linears)(**batch).logits
        assert (theirs - tiny_llava()(**batch).logits).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert len(lora.linears) == 2 * 7
    assert not lora.projector


def test_a_projector_that_peft_trained_comes_along(tiny_llava, tmp_path):
    peft = peft_folder(tiny_llava(), tmp_path, r=2, modules_to_save=["linear_1"])
    lora = read_lora(tmp_path, "adapter", tiny_llava())
    assert set(lora.projector) == {
        f"model.multi_modal_projector.linear_1.{kind}" for kind in ("weight", "bias")
    }
    wanted = peft.base_model.model.model.multi_modal_projector.linear_1.modules_to_save["default"].weight
    assert torch.equal(lora.projector["model.multi_modal_projector.linear_1.weight"], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not allowed"),
        ({"use_dora": True}, "use_dora True is not allowed"),
        ({"bias": "all"}, "bias 'all' is not allowed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not allowed"),
        ({"r": 0}, "r 0 is not allowed"),
        ({"lora_alpha": None}, "lora_alpha None is not allowed"),
        ({"r": 3}, r"lora_A.weight has shape \(2, 16\), not \(3, 16\)"),
        ({"rank_pattern": {"q_proj": 4}}, r"has shape \(2, 16\), not \(4, 16\)"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern '\\(' is not a regular expression"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern 'q_proj': 0 is not allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_no_plain_lora_are_named(settings, message, tiny_llava, tmp_path):
    write_folder(tmp_path, pair(), **settings)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path, "adapter.folders.x", tiny_llava())
    assert str(caught.value).startswith(f"adapter.folders.x: {tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "holds no LoRA"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 16)}, f"lacks {Q}.lora_B.weight"),
        ({**pair(), "lm_head.lora_A.weight": torch.ones(2, 16)}, "unknown weight lm_head.lora_A.weight"),
        ({**pair(Q.replace("language_model", "vision_tower"))}, "unknown weight model.vision_tower"),
        ({**pair(), f"{Q}.lora_magnitude_vector.weight": torch.ones(16)}, "unknown weight .*magnitude"),
        (pair(width=15), r"has shape \(2, 15\), not \(2, 16\)"),
        ({**pair(), f"{Q}.lora_B.weight": torch.full((16, 2), torch.nan)}, "not made of finite numbers"),
    ],
    ids=range(7),
)
def test_weights_that_do_not_fit_are_named(weights, message, tiny_llava, tmp_path):
    write_folder(tmp_path, weights)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path, "adapter", tiny_llava())
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tiny_llava, tmp_path):
    model = tiny_llava()
    with pytest.raises(UserError, match="has no readable adapter_config.json"):
        read_lora(tmp_path / "nowhere", "adapter", model)
    write_folder(tmp_path, pair())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        read_lora(tmp_path, "adapter", model)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        read_lora(tmp_path, "adapter", model)
    for text in ("{", json.dumps([1])):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="adapter_config.json is not"):
            read_lora(tmp_path, "adapter", model)


def test_filling_a_stack_keeps_the_update_whatever_the_stacks_scale_and_rank():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5), (4, 2)))
    stack_A = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    stack_B = torch.zeros(3, 3, 4, dtype=torch.float64)
    fill(stack_A, stack_B, 1, (A, B, 0.7), scale=2.0)
    for o in range(4):
        for i in range(5):
            ours = 2.0 * sum(stack_B[1, r, o] * stack_A[1, r, i] for r in range(3))
            theirs = 0.7 * sum(B[o, r] * A[r, i] for r in range(2))
            torch.testing.assert_close(ours, theirs)
    assert not stack_B[0].any()
    assert not stack_B[2].any()
