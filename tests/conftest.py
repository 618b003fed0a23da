"""Shared fixtures: a tiny random LLaVA in float64, cache and thread settings."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 3
# Tests that start Ray or a second worker take longest.
MANY_PROCESSES = {
    "orchestrator": (
        "test_ahead",
        "test_cli",
        "test_cluster",
        "test_sources_end_to_end",
        "test_stream_sweep",
        "test_sweep",
        "test_tracking",
    ),
    "training": (
        "test_engine",
        "test_llava_workers",
        "test_method_workers",
        "test_past_workers",
        "test_stages",
        "test_workers",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; with `pytest -n 2` each file stays with one worker, whose fixtures it shares."""
    items.sort(key=lambda item: item.path.stem not in MANY_PROCESSES.get(item.path.parent.name, ()))


@pytest.fixture
def tiny_llava():
    """A function that makes a LLaVA with 2 blocks of width 16 and 4 image tokens, in float64."""

    def make(seed: int = 0) -> LlavaForConditionalGeneration:
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        text = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4,
            vision_feature_layer=-1, vision_feature_select_strategy="default",
        )  # fmt: skip
        return LlavaForConditionalGeneration(config).double().eval()

    return make


@pytest.fixture
def batch():
    """Inputs of two samples of different length, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 32, (2, 12), generator=generator)
    ids[:, 1:5] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = 0
    pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
