"""Batches: labels on the answer alone, padding on the right side, prompts as the processor makes them."""

import numpy as np
import pytest
import torch

from workloads.config import ModelConfig
from workloads.data.collate import IGNORE, prompt_batch, train_batch
from workloads.data.pool import Sample
from workloads.llava.build import build
from workloads.llava.prompt import Turn


@pytest.fixture(scope="module")
def llava():
    return build(ModelConfig(), "fp32")


def sample(question, answer, value=0):
    image = np.full((96, 96, 3), value, np.uint8)
    turn = Turn(question=f"<image>\n{question}", answer=answer)
    return Sample(
        id="s", domain="general", images_HWC=(image,), turns=(turn,), answers=(answer,), question_type="name"
    )


def test_labels_cover_answer_and_end_token_and_nothing_else(llava):
    samples = [sample("what is this ?", "CAT"), sample("where is the mark ?", "top left")]
    batch = train_batch(samples, llava)
    tokenizer = llava.prompter.tokenizer
    for row, s in enumerate(samples):
        supervised = batch.labels_BT[row][batch.labels_BT[row] != IGNORE].tolist()
        assert supervised[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(supervised[:-1]) == s.answer
        valid = int(batch.mask_BT[row].sum())
        assert batch.ids_BT[row, valid - len(supervised) : valid].tolist() == supervised
        assert batch.mask_BT[row, :valid].all()
        assert (batch.ids_BT[row, valid:] == tokenizer.pad_token_id).all()


def test_prompt_ids_equal_the_processors_own(llava):
    s = sample("what is this ?", "boot", 30)
    ours = prompt_batch([s], llava)
    theirs = llava.processor(
        images=list(s.images_HWC), text=[llava.prompter.prompt(s.turns)], return_tensors="pt"
    )
    assert ours.ids_BT.tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(ours.vision, theirs["pixel_values"])
    assert (ours.ids_BT == llava.model.config.image_token_id).sum() == 64


def test_prompts_are_padded_on_the_left(llava):
    batch = prompt_batch([sample("what is this ?", "x"), sample("which side is the mark on ?", "x")], llava)
    assert batch.mask_BT[0].tolist() == sorted(batch.mask_BT[0].tolist())
    assert batch.mask_BT[1].all()


@pytest.mark.parametrize("text", ["CAT", "top left", "iv", "30", "4 4", "QUEUE"])
def test_answers_survive_encoding(llava, text):
    encoded = llava.prompter.encode([Turn(question="<image>\nwhat is this ?", answer=text)])
    assert llava.prompter.decode(encoded.ids[encoded.prompt_length :]) == text
    unknown = llava.prompter.tokenizer.unk_token_id
    assert unknown not in encoded.ids
