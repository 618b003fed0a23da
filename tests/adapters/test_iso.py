"""Fair ranks at LLaVA-7B size against the published counts, and at tiny size against built models."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from workloads.adapters import lora, mole
from workloads.adapters.base import Trace
from workloads.adapters.parts import iso


@pytest.fixture(scope="module")
def llava_7b():
    """Vicuna-7B behind CLIP ViT-L/14-336, as numbers alone."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def test_mole_of_rank_32_and_3_experts_matches_lora_of_rank_69_in_all_and_32_per_token(llava_7b):
    config = mole.Config(num_experts=3, rank_per_expert=32)
    assert iso.measured(llava_7b, config).num_weights == pytest.approx(173.15e6, rel=1e-4)
    assert iso.iso_total(llava_7b, config) == 69
    assert iso.iso_active(llava_7b, config) == 32


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_plain_lora_matches_itself(rank, llava_7b):
    config = lora.Config(rank=rank)
    assert iso.measured(llava_7b, config).num_weights == 2_498_560 * rank
    assert iso.iso_total(llava_7b, config) == iso.iso_active(llava_7b, config) == rank


def test_attention_alone_matches_its_share_of_all_linears(llava_7b):
    config = lora.Config(rank=32, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert iso.measured(llava_7b, config).num_weights == 1_048_576 * 32
    # 33,554,432 / 2,498,560 = 13.43.
    assert iso.iso_total(llava_7b, config) == 13


def test_no_other_rank_is_nearer(tiny_llava):
    model = tiny_llava()
    for experts in (1, 2, 5):
        config = mole.Config(num_experts=experts, rank_per_expert=2)
        wanted = mole.attach(tiny_llava(), config, Trace())
        for found, target in (
            (iso.iso_total(model.config, config), wanted.num_weights),
            (iso.iso_active(model.config, config), wanted.num_active),
        ):
            counts = {
                rank: lora.attach(tiny_llava(), lora.Config(rank=rank), Trace()).num_weights
                for rank in range(max(1, found - 1), found + 2)
            }
            assert abs(counts[found] - target) == min(abs(count - target) for count in counts.values())


def test_a_method_smaller_than_any_lora_is_matched_by_rank_1(tiny_llava):
    config = lora.Config(rank=1, targets=["k_proj"])
    assert iso.iso_total(tiny_llava().config, config) == 1


def test_nothing_is_allocated(llava_7b):
    assert all(weight.device == torch.device("meta") for weight in iso.empty(llava_7b).parameters())


def test_the_pocket_base_is_found_by_name():
    shape = iso.shape_of("pocket")
    assert sum(w.numel() for w in iso.empty(shape).parameters()) <= 3_000_000
    assert iso.measured(shape, lora.Config(rank=1)).num_weights == 4 * (4 * 2 * 128 + 3 * (128 + 384))
