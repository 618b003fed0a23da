"""The committed base: small, whole, and it sees: held-out captions are right far more often than by chance."""

import json

import pytest

from workloads.config import DataConfig, ModelConfig
from workloads.data import sources
from workloads.data.pocket import vocabulary
from workloads.errors import UserError
from workloads.llava.build import build
from workloads.llava.folder import resolve
from workloads.llava.pocket import new_processor
from workloads.training.pretrain import caption_scores

NUM_ITEMS = 100


@pytest.fixture(scope="module")
def llava():
    return build(ModelConfig(), "fp32")


def test_it_has_at_most_3_million_weights_and_64_image_tokens(llava):
    assert sum(w.numel() for w in llava.model.parameters()) <= 3_000_000
    assert llava.model.config.image_seq_length == 64
    assert (resolve("pocket") / "model.safetensors").stat().st_size <= 12 * 2**20


def test_its_tokenizer_knows_every_word_of_the_benchmark(llava):
    tokenizer = llava.prompter.tokenizer
    for word in vocabulary():
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert tokenizer.get_vocab() == new_processor(vocabulary()).tokenizer.get_vocab()


def test_its_card_is_about_this_data():
    card = json.loads((resolve("pocket") / "card.json").read_text())
    assert card["data_hash"] == sources.of(DataConfig()).digest("general", "train")


def test_held_out_captions_are_right_and_those_of_other_images_are_not(llava):
    seen = caption_scores(llava, "val", NUM_ITEMS)
    shuffled = caption_scores(llava, "val", NUM_ITEMS, shuffled=True)
    for domain, score in seen.items():
        assert score >= 0.65, (domain, score)
        assert shuffled[domain] <= 0.1


def test_a_folder_without_a_model_is_told():
    with pytest.raises(UserError, match=r"model\.name_or_path: 'pockt' is not allowed"):
        resolve("pockt")


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    source = resolve("pocket")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    lost = next(name for name in sorted(weights) if "projector" in name)
    save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="missing keys"):
        build(ModelConfig(name_or_path=str(tmp_path)), "fp32")
