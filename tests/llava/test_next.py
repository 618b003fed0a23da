"""LLaVA-NeXT checkpoints: ids, labels and pixels are the processor's own, losses and answers the model's own."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.llava import checkpoints
from tests.training.runs import do, small
from workloads import record
from workloads.adapters.base import Trace
from workloads.config import ModelConfig, from_tree
from workloads.data import vetting
from workloads.data.collate import IGNORE, prompt_batch, train_batch
from workloads.data.pool import Sample
from workloads.data.rows import ROW
from workloads.errors import UserError
from workloads.evaluation.answer import answer
from workloads.identity import fingerprint
from workloads.llava import images, tower, vce
from workloads.llava.build import build, prompter_of
from workloads.llava.prompt import Turn
from workloads.training import engine, loss

END = 2
# Height and width of pictures: squares, wide and narrow ones, larger than all grids, thin lines.
SIZES = [(28, 28), (30, 60), (61, 33), (100, 100), (20, 90), (90, 20), (200, 150), (3, 90), (90, 3), (1, 1)]
EXACT = checkpoints.TEMPLATE.replace("+ ' '}}{% endgeneration %}", "}}{% endgeneration %}{{ ' ' }}")
# That of llava-v1.6-mistral-7b-hf in short: another frame, and an end token of its own.
INSTRUCT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    " [/INST]{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    ends = [END, *range(5, 390, 7)]
    return checkpoints.write_next(tmp_path_factory.mktemp("model") / "next", spread=0.1, ends=ends)


@pytest.fixture(scope="module")
def llava(folder):
    found = build(ModelConfig(name_or_path=str(folder)), "fp32")
    found.model.eval()
    return found


def picture(size, seed=0):
    return np.random.default_rng([seed, *size]).integers(0, 256, (*size, 3), dtype=np.uint8)


def sample(*turns, sizes=(), system=""):
    said = tuple(Turn(question=question, answer=answer) for question, answer in turns)
    return Sample(
        id="s", domain="general", system=system, turns=said, answers=(said[-1].answer,), question_type="name",
        images_HWC=tuple(picture(size, seed) for seed, size in enumerate(sizes)),
    )  # fmt: skip


def of_size(size, answer="It is a cat."):
    return sample(("<image>\nwhat is this ?", answer), sizes=[size])


TALK = sample(
    ("what is a cat ?", "this"),
    ("<image>\nwhat is this ?", "A cat."),
    ("<image>\n<image>\nwhere ?", "left"),
    sizes=SIZES[2:5],
)
TEXT = sample(("what is a boot ?", "It is this."), ("what ?", "boot"))


def theirs(llava, s, asks=False):
    """What the processor itself makes of a sample's conversation and pictures."""
    messages, pictures = [], iter(s.images_HWC)
    for turn in s.turns:
        count = turn.question.count("<image>")
        parts = [{"type": "image", "image": Image.fromarray(next(pictures))} for _ in range(count)]
        parts.append({"type": "text", "text": turn.question.replace("<image>\n", "")})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    asked = {"add_generation_prompt": True} if asks else {"chat_template": EXACT}
    return llava.processor.apply_chat_template(
        messages[:-1] if asks else messages, tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=not asks, **asked,
    )  # fmt: skip


def with_ends(llava, made):
    """The processor's ids with an end token behind every answer, and what is supervised of them.

    The space that the template puts behind the last answer goes; a space of its own before an answer is the model's.
    """
    ids, mask = made["input_ids"][0].tolist()[:-1], made["assistant_masks"][0].tolist()[:-1]
    blank = [llava.prompter.tokenizer.convert_ids_to_tokens(token) == "▁" for token in ids]
    told = [m or (blank[k] and k + 1 < len(mask) and mask[k + 1]) for k, m in enumerate(mask)]
    wanted, labels = [], []
    for k, token in enumerate(ids):
        wanted.append(token)
        labels.append(token if told[k] else IGNORE)
        if told[k] and not (k + 1 < len(told) and told[k + 1]):
            wanted.append(END)
            labels.append(END)
    return wanted, labels


def test_every_weight_of_the_files_is_in_the_model(folder, llava):
    held = {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
    assert "image_newline" in held
    for name, weight in llava.model.state_dict().items():
        assert torch.equal(weight, held.pop(checkpoints.hub_name(name)).float()), name
    assert not held


@pytest.mark.parametrize("s", [*map(of_size, SIZES), TALK], ids=[*map(str, SIZES), "talk"])
def test_ids_labels_and_pixels_are_the_processors_own(s, llava):
    made, batch = theirs(llava, s), train_batch([s], llava)
    ids, labels = with_ends(llava, made)
    assert batch.ids_BT[0].tolist() == ids
    assert batch.labels_BT[0].tolist() == labels
    assert torch.equal(batch.vision, made["pixel_values"])
    assert batch.sizes_N2 is not None
    assert (
        batch.sizes_N2.tolist() == made["image_sizes"].tolist() == [list(i.shape[:2]) for i in s.images_HWC]
    )
    if len(s.turns) > 1:  # the processor puts no end token behind the answers before
        return
    asked = theirs(llava, s, asks=True)
    assert prompt_batch([s], llava).ids_BT.tolist() == asked["input_ids"].tolist()


@pytest.mark.parametrize("size", [(h, w) for h in (1, 13, 40, 77) for w in (5, 28, 59, 160)])
def test_an_image_takes_as_many_tokens_as_the_model_makes_of_it(size, llava):
    batch = train_batch([of_size(size)], llava)
    (features,) = llava.model.get_image_features(batch.vision, batch.sizes_N2).pooler_output
    assert len(features) == int((batch.ids_BT == llava.model.config.image_token_id).sum())
    assert llava.prompter.tiles.tokens(size) == len(features)


def mixed():
    return [of_size(SIZES[1]), TEXT, TALK, of_size(SIZES[0], "top left")]


@pytest.mark.parametrize("samples", [[of_size(SIZES[4])], mixed()], ids=["one", "mixed"])
def test_the_loss_is_the_models_own_on_the_same_labels(samples, llava):
    batch = train_batch(samples, llava)
    with torch.no_grad():
        losses_N, _ = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        own = llava.model(**batch.inputs(), labels=batch.labels_BT).loss
    torch.testing.assert_close(losses_N.mean(), own)


def test_the_loss_of_a_sample_follows_from_the_processors_output_alone(llava):
    made = theirs(llava, of_size(SIZES[5]))
    ids, labels = (torch.tensor([row]) for row in with_ends(llava, made))
    with torch.no_grad():
        own = llava.model(
            input_ids=ids, pixel_values=made["pixel_values"], image_sizes=made["image_sizes"], labels=labels
        ).loss
        losses_N, _ = loss.token_losses(
            lambda inputs: llava.model(**inputs), train_batch([of_size(SIZES[5])], llava)
        )
    torch.testing.assert_close(losses_N.mean(), own)


@pytest.mark.parametrize("samples", [[TEXT], [TEXT, TEXT], [TEXT, TALK]], ids=["alone", "two", "mixed"])
@pytest.mark.parametrize("make", [train_batch, prompt_batch])
def test_text_without_images_is_read_as_if_there_were_no_tower(samples, make, llava):
    batch = make(samples, llava)
    valid = batch.mask_BT[0].bool()
    with torch.no_grad():
        logits_TV = llava.model(**batch.inputs()).logits[0, valid]
        alone_TV = llava.model(input_ids=batch.ids_BT[:1, valid]).logits[0]
    torch.testing.assert_close(logits_TV, alone_TV, rtol=1e-4, atol=1e-4)


def test_tower_projector_and_newline_are_in_the_graph_of_a_batch_without_images(llava):
    batch = train_batch([TEXT, TEXT], llava)
    llava.model.zero_grad()
    llava.model(**batch.inputs()).logits[batch.mask_BT.bool()].square().sum().backward()
    weights = dict(llava.model.model.named_parameters())
    for name in (
        "image_newline",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.pre_layrnorm.weight",
    ):
        assert weights[name].grad is not None, name
        assert not weights[name].grad.any(), name
    llava.model.zero_grad()


class Pool:
    """Samples by index."""

    def __init__(self, samples):
        self.samples = samples

    def sample(self, index):
        return self.samples[index]


def test_answers_are_the_models_own_one_by_one(llava, folder):
    two = sample(("<image>\n<image>\nwhere ?", "left"), sizes=SIZES[2:4])
    samples = [sample(("what is a boot ?", "this")), two, *map(of_size, SIZES)]
    config = small("lora", execution={"eval_batch": 3}, eval={"max_new_tokens": 12})
    with engine.contained():
        engine.join()
        trace = Trace()
        found = answer(config, llava, trace, {"general": Pool(samples)}, {"general": range(len(samples))})
    for row, s in zip(found.predictions, samples, strict=True):
        made = theirs(llava, s, asks=True)
        ends = llava.model.generation_config.eos_token_id
        ids = llava.model.generate(**made, do_sample=False, max_new_tokens=12, eos_token_id=ends)
        assert row["raw"] == llava.prompter.decode(ids[0, made["input_ids"].shape[1] :].tolist())
    assert len({row["raw"] for row in found.predictions}) > 2


def test_an_instruct_template_is_followed(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text(INSTRUCT)
    prompter = prompter_of(ModelConfig(name_or_path=str(tmp_path)))
    sizes = [image.shape[:2] for image in TALK.images_HWC]
    encoded = prompter.encode(TALK.turns, "", sizes)
    assert encoded.ids[: encoded.prompt_length] == prompter.prefix(TALK.turns, "", sizes)
    assert encoded.ids.count(END) == 3
    assert encoded.ids.count(prompter.image_id) == sum(map(prompter.tiles.tokens, sizes))


def test_lengths_of_vetted_rows_count_the_tokens_of_each_size(llava):
    rows = [
        {
            "id": str(side), "images": [{"bytes": _png(picture((side, side))), "path": None}], "system": "",
            "turns": [{"question": "<image>\nwhat ?", "answer": "a bag"}], "answers": ["a bag"],
            "question_type": "all", "fault": "",
        }
        for side in (10, 28, 90)
    ]  # fmt: skip
    rows[1]["images"][0]["bytes"] = b"none"
    wide = [{**rows[0], "images": [{"bytes": _png(picture((20, 90))), "path": None}]}]
    held = datasets.Dataset.from_list(rows + wide, features=ROW)
    found = vetting.vet(held, llava.prompter, 10_000)
    assert [bool(verdict.fault) for verdict in found] == [False, True, False, False]
    assert found[1].fault.startswith("image: ")
    for verdict, size in ((found[0], (10, 10)), (found[2], (90, 90)), (found[3], (20, 90))):
        turns = [Turn(question="<image>\nwhat ?", answer="a bag")]
        assert verdict.length == len(llava.prompter.encode(turns, "", [size]).ids)
    assert found[3].length != found[0].length


def _png(image_HWC):
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_run_trains_answers_and_leaves_the_newline_frozen(folder, tmp_path):
    model = {"name_or_path": str(folder)}
    config = small("mole", model=model, data={"samples": 8, "max_length": 200}, eval={"samples": 3})
    result, reports = do(config, tmp_path)
    assert result.identity["image_processor"] == "LlavaNextImageProcessorPil"
    assert len([report for report in reports if report["event"] == "train"]) == 1
    saved = load_file(tmp_path / record.ADAPTER / "adapter_model.safetensors")
    assert any("multi_modal_projector.linear_1" in name for name in saved)
    assert not any("image_newline" in name for name in saved)
    before = build(config.model, "fp32").model.model.multi_modal_projector.linear_1.weight
    after = next(w for name, w in saved.items() if name.endswith("multi_modal_projector.linear_1.weight"))
    assert not torch.equal(before, after)
    assert result.cost.iso_active > 0


def test_what_needs_one_grid_an_image_is_refused(folder, llava, tmp_path):
    with pytest.raises(UserError, match=r"execution.feature_cache: true is not allowed; LLaVA-NeXT"):
        tower.levels_of(llava, [])
    with pytest.raises(UserError, match=r"model.vce: true is not allowed; .* LLaVA-NeXT has tiles"):
        vce.check(llava.model, [-2], 2, 2)
    with pytest.raises(UserError, match=r"model.image_aspect: 'pad' is not allowed; LLaVA-NeXT cuts"):
        build(ModelConfig(name_or_path=str(folder), image_aspect="pad"), "fp32")
    for section in ({"execution": {"feature_cache": True}}, {"model": {"vce": True, "vce_heads": 2}}):
        tree = {"data": {"samples": 8, "max_length": 200}, "eval": {"samples": 3}, **section}
        config = small("lora", **{**tree, "model": {"name_or_path": str(folder), **section.get("model", {})}})
        with pytest.raises(UserError, match="LLaVA-NeXT"):
            do(config, tmp_path / "out")
        assert not (tmp_path / "out" / record.CONFIG).exists()


def test_other_grids_than_the_models_are_told(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tree = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    checkpoints.write_json(
        tmp_path / "preprocessor_config.json", {**tree, "image_grid_pinpoints": checkpoints.GRIDS[:2]}
    )
    with pytest.raises(UserError, match="its image processor's image_grid_pinpoints are"):
        prompter_of(ModelConfig(name_or_path=str(tmp_path)))


@pytest.mark.parametrize("shape", [(3, 5), (40, 40)])
def test_zeros_stand_for_tiles_that_an_image_has_less_of(shape, llava):
    processor = llava.processor.image_processor
    one = images.pixels([picture(shape)], processor, "crop")
    both = images.pixels([picture(shape), picture((200, 150))], processor, "crop")
    assert both.shape[1] >= one.shape[1]
    assert torch.equal(both[0, : one.shape[1]], one[0])
    assert not both[0, one.shape[1] :].any()


def test_the_fingerprint_takes_a_next_checkpoint_without_its_weights(folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    tree = {"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}
    assert fingerprint(from_tree({**tree, "model": {"name_or_path": str(tmp_path)}}))
