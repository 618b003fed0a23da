"""Prompts and labels are the processor's own, plus the end token that LLaVA-1.5's template leaves out."""

import numpy as np
import pytest
import torch

from tests.llava import checkpoints
from workloads.config import ModelConfig
from workloads.data.collate import IGNORE, prompt_batch, train_batch
from workloads.data.pool import Sample
from workloads.errors import UserError
from workloads.llava.build import build
from workloads.llava.prompt import Prompter, Turn

END = 2
TALKS = {
    "one turn": [("<image>\nwhat is this ?", "It is a cat.")],
    "two turns": [("<image>\nwhat is this ?", "A cat."), ("where is it ?", "top left")],
    "image in a later turn": [("what is a cat ?", "this"), ("where is it ?\n<image>", "bottom right")],
    "two images": [("<image>\n<image>\nwhich side is the mark on ?", "left")],
    "image in the middle": [("what is <image> and where is it ?", "a bag, there")],
    "text only": [("what is a boot ?", "It is this."), ("what ?", "boot")],
    "letters that spell": [("<image>\nwhat ?", "Ünïcode 猫 #42")],
}
EXACT = checkpoints.TEMPLATE.replace("+ ' '}}{% endgeneration %}", "}}{% endgeneration %}{{ ' ' }}")
SYSTEMS = ("", "a chat between a curious human and an assistant.")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = checkpoints.write(tmp_path_factory.mktemp("model") / "llava")
    return build(ModelConfig(name_or_path=str(folder)), "fp32")


def turns_of(talk):
    return [Turn(question=question, answer=answer) for question, answer in talk]


def sample(talk, system=""):
    images = sum(question.count("<image>") for question, _ in talk)
    return Sample(
        id="s", domain="general", system=system, turns=tuple(turns_of(talk)), answers=(talk[-1][1],),
        images_HWC=tuple(np.full((20 + i, 30, 3), 50 * i, np.uint8) for i in range(images)), question_type="name",
    )  # fmt: skip


def theirs(llava, talk, system, **asked):
    """What the processor itself makes of a conversation: ids, and the mask of answers."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for question, answer in talk:
        parts = []
        for k, text in enumerate(question.split("<image>")):
            parts += [{"type": "image", "image": np.zeros((28, 28, 3), np.uint8)}] if k else []
            parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if asked.get("add_generation_prompt"):
        messages.pop()
    asked |= {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    made = llava.processor.apply_chat_template(messages, **asked)
    # The same text, but the space behind an answer is no part of it: it is part of the token "▁USER" that follows.
    exact = llava.processor.apply_chat_template(messages, chat_template=EXACT, **asked)
    assert exact["input_ids"] == made["input_ids"]
    return made["input_ids"][0], exact["assistant_masks"][0]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", TALKS)
def test_ids_and_labels_are_the_processors_own_with_an_end_token_behind_every_answer(name, system, llava):
    talk = TALKS[name]
    ids, mask = theirs(llava, talk, system)
    ours = llava.prompter.encode(turns_of(talk), system)
    # The template ends every answer with a space, which is a token of its own only at the very end.
    assert llava.prompter.tokenizer.decode(ids[-1:]).strip() == ""
    ids, mask = ids[:-1], mask[:-1]
    # A space of its own before an answer, which the processor leaves out, has to be said by the model too.
    blank = [llava.prompter.tokenizer.convert_ids_to_tokens(token) == "▁" for token in ids]
    mask = [m or (blank[k] and k + 1 < len(mask) and mask[k + 1]) for k, m in enumerate(mask)]
    wanted, labels = [], []
    for k, (token, is_answer) in enumerate(zip(ids, mask, strict=True)):
        wanted.append(token)
        labels.append(bool(is_answer))
        if is_answer and not (k + 1 < len(mask) and mask[k + 1]):
            wanted.append(END)
            labels.append(True)
    assert ours.ids == wanted
    assert ours.supervised == labels
    assert sum(token == END for token in ours.ids) == len(talk)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", ["one turn", "two images", "image in the middle", "letters that spell"])
def test_a_prompt_is_the_processors_own(name, system, llava):
    ids, _ = theirs(llava, TALKS[name], system, add_generation_prompt=True)
    assert llava.prompter.prefix(turns_of(TALKS[name]), system) == ids


@pytest.mark.parametrize("name", TALKS)
def test_what_is_trained_begins_with_what_is_asked(name, llava):
    turns = turns_of(TALKS[name])
    whole = llava.prompter.encode(turns, SYSTEMS[1])
    assert whole.ids[: whole.prompt_length] == llava.prompter.prefix(turns, SYSTEMS[1])
    assert llava.prompter.decode(whole.ids[whole.prompt_length :]) == turns[-1].answer
    assert all(whole.supervised[whole.prompt_length :])


def test_space_around_an_answer_is_dropped(llava):
    plain, spaced = ([Turn(question="what ?", answer=answer)] for answer in ("a cat", "  a cat\n"))
    assert llava.prompter.encode(plain) == llava.prompter.encode(spaced)


def test_a_templates_own_end_token_is_used_and_not_doubled(llava):
    processor = type(llava.processor)(
        image_processor=llava.processor.image_processor,
        tokenizer=llava.processor.tokenizer,
        chat_template=checkpoints.TEMPLATE.replace(" ' '}}{% endgeneration", " '</s>\n'}}{% endgeneration"),
    )  # fmt: skip
    turns = turns_of(TALKS["two turns"])
    encoded = Prompter(processor, checkpoints.IMAGE_TOKENS).encode(turns)
    assert sum(token == END for token in encoded.ids) == 2
    assert encoded.ids[-1] == END
    ends = [k for k, token in enumerate(encoded.ids) if token == END]
    assert all(encoded.supervised[k] for k in ends)
    assert not encoded.supervised[ends[0] + 1]


@pytest.mark.parametrize(
    ("turn", "system", "reason"),
    [
        (Turn(question="what ?", answer="an <image>"), "", "answer: holds <image>"),
        (Turn(question="what ?", answer="this"), "see <image>", "<image>: 1 in the rendered conversation, 0"),
    ],
)
def test_placeholders_elsewhere_than_in_questions_are_refused(turn, system, reason, llava):
    with pytest.raises(ValueError, match=reason):
        llava.prompter.encode([turn], system)


def test_a_template_that_asks_in_another_way_than_it_answers_is_told(llava):
    processor = type(llava.processor)(
        image_processor=llava.processor.image_processor,
        tokenizer=llava.processor.tokenizer,
        chat_template=checkpoints.TEMPLATE.replace("'ASSISTANT:'", "'assistant says:'"),
    )
    with pytest.raises(UserError, match="asks for an answer by"):
        Prompter(processor, checkpoints.IMAGE_TOKENS)


def test_batches_label_every_answer_and_hold_all_images_in_order(llava):
    samples = [sample(talk) for talk in TALKS.values()]
    batch = train_batch(samples, llava)
    assert len(batch.vision) == sum(len(s.images_HWC) for s in samples) == 7
    for row, s in enumerate(samples):
        encoded = llava.prompter.encode(s.turns)
        length = len(encoded.ids)
        assert batch.mask_BT[row].tolist() == [1] * length + [0] * (batch.ids_BT.shape[1] - length)
        wanted = [t if told else IGNORE for t, told in zip(encoded.ids, encoded.supervised, strict=True)]
        assert batch.labels_BT[row, :length].tolist() == wanted
        assert (batch.labels_BT[row, length:] == IGNORE).all()
        images = int((batch.ids_BT[row] == llava.model.config.image_token_id).sum())
        assert images == len(s.images_HWC) * checkpoints.IMAGE_TOKENS
    one = train_batch(samples[3:4], llava).vision
    assert torch.equal(batch.vision[3:5], one)


@pytest.mark.parametrize("make", [train_batch, prompt_batch])
@pytest.mark.parametrize(
    "talks", [["text only"], ["text only", "text only"], ["text only", "image in a later turn"]]
)
def test_text_without_images_is_read_as_if_there_were_no_tower(talks, make, llava):
    """Beside other samples or alone: its logits are those of the language model on its tokens alone."""
    batch = make([sample(TALKS[name]) for name in talks], llava)
    llava.model.eval()
    with torch.no_grad():
        logits_BTV = llava.model(**batch.inputs()).logits
        valid = batch.mask_BT[0].bool()
        ids_1T = batch.ids_BT[:1, valid]
        alone_TV = llava.model(input_ids=ids_1T).logits[0]
    assert llava.model.config.image_token_id not in ids_1T
    torch.testing.assert_close(logits_BTV[0, valid], alone_TV, rtol=1e-4, atol=1e-5)


def test_tower_and_projector_are_in_the_graph_of_a_batch_without_images(llava):
    llava.model.train()
    batch = train_batch([sample(TALKS["text only"])] * 2, llava)
    assert batch.vision.shape == (1, 3, checkpoints.IMAGE_SIZE, checkpoints.IMAGE_SIZE)
    llava.model.zero_grad()
    llava.model(**batch.inputs()).logits[batch.mask_BT.bool()].square().sum().backward()
    for part in ("model.multi_modal_projector", "model.vision_tower.embeddings"):
        for name, weight in llava.model.get_submodule(part).named_parameters():
            assert weight.grad is not None, name
            assert not weight.grad.any(), name
    llava.model.zero_grad()
