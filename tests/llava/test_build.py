"""Checkpoints in LLaVA-1.5's format and from parts: loaded strictly, seen through the named processor."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.llava import checkpoints
from workloads.config import ModelConfig, from_tree
from workloads.data.collate import train_batch, vision
from workloads.data.pool import Sample
from workloads.errors import UserError
from workloads.identity import fingerprint, identity
from workloads.llava import images, tower
from workloads.llava.build import base_name, build, folder_of
from workloads.llava.prompt import Turn

FIRST, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture
def folder(original, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(original, tmp_path / "llava")


def built(folder, **fields):
    return build(ModelConfig(name_or_path=str(folder), **fields), "fp32")


def sample(image_HWC, answer="a cat"):
    turns = (Turn(question="<image>\nwhat is this ?", answer=answer),)
    return Sample(
        id="s",
        domain="general",
        images_HWC=(image_HWC,),
        turns=turns,
        answers=(answer,),
        question_type="name",
    )


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_every_weight_of_the_files_is_in_the_model(original):
    own = built(original).model.state_dict()
    held = {name: w for file in original.glob("*.safetensors") for name, w in load_file(file).items()}
    assert len(held) == len(own)
    for name, weight in own.items():
        assert torch.equal(weight, held[checkpoints.hub_name(name)].float()), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention_are_those_asked_for(dtype, attention, original):
    model = build(ModelConfig(name_or_path=str(original), attention=attention), dtype).model
    assert {w.dtype for w in model.parameters()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    for part in (model.model.language_model, model.model.vision_tower):
        assert part.config._attn_implementation == attention


def rewrite(folder, change):
    weights = load_file(folder / FIRST)
    before = set(weights)
    change(weights)
    save_file(weights, folder / FIRST, {"format": "pt"})
    tree = json.loads((folder / INDEX).read_text())
    for name in before - set(weights):
        del tree["weight_map"][name]
    tree["weight_map"] |= dict.fromkeys(set(weights) - before, FIRST)
    (folder / INDEX).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop(sorted(weights)[3]), "has missing keys: "),
        (lambda weights: weights.update(extra=torch.zeros(1)), "has unexpected keys: extra"),
        (
            lambda weights: weights.update({sorted(weights)[3]: torch.zeros(7, 5)}),
            "has mismatched keys: ",
        ),
    ],
)
def test_other_weights_than_the_models_are_told_before_any_is_loaded(change, expected, folder, monkeypatch):
    rewrite(folder, change)
    monkeypatch.setattr("workloads.llava.kinds.LlavaForConditionalGeneration.from_pretrained", None)
    with pytest.raises(UserError, match=expected):
        built(folder)


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def to_bin(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def cut(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:1000])


def of_another_type(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "model_type": "llama"}))


def larger_images(folder):
    size = {"crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 42}}
    checkpoints.write_json(folder / "preprocessor_config.json", {**checkpoints.IMAGES, **size})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (to_bin, "pytorch_model.bin can hold code and is not read; convert it"),
        (drop(FIRST), f"lacks {FIRST}, which its index names"),
        (cut, "is not a whole safetensors file"),
        (of_another_type, "a model of type llava or llava_next; .* is of type llama"),
        (drop("chat_template.jinja"), "has no chat template"),
        (drop("tokenizer.json"), "has a tokenizer of another model|has no usable processor"),
        (drop("preprocessor_config.json"), "has no usable processor"),
        (larger_images, r"makes images of \(42, 42\), and its tower takes \(28, 28\)"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(spoil, expected, folder):
    spoil(folder)
    with pytest.raises(UserError, match=expected) as error:
        built(folder)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_attention_that_is_not_installed_is_told(original):
    with pytest.raises(
        UserError, match="model.attention: 'flash_attention_2' is not allowed; it needs a GPU"
    ):
        built(original, attention="flash_attention_2")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_an_image_processor_that_is_not_installed_is_told(original):
    with pytest.raises(
        UserError, match="model.image_backend: 'torchvision' .*needs CLIPImageProcessor, and only"
    ):
        built(original, image_backend="torchvision")


def test_a_name_that_is_not_on_this_machine_says_how_to_fetch_it(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'nobody/nothing' is no folder .* set model.hub to true to fetch it"):
        built("nobody/nothing")


@pytest.mark.parametrize("told", [{}, {"num_additional_image_tokens": 0}, {"patch_size": 7}])
def test_the_tower_decides_the_number_of_image_tokens_whatever_the_processors_file_says(told, folder):
    tree = json.loads((folder / "processor_config.json").read_text())
    del tree["num_additional_image_tokens"]
    checkpoints.write_json(folder / "processor_config.json", {**tree, **told})
    llava = built(folder)
    assert llava.prompter.image_tokens == checkpoints.IMAGE_TOKENS
    batch = train_batch([sample(noise(30, 40))], llava)
    (features,) = llava.model.get_image_features(batch.vision).pooler_output
    assert len(features) == int((batch.ids_BT == llava.model.config.image_token_id).sum())


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (6, 5), (1, 8)])
def test_a_squared_image_has_the_mean_colour_around_it(shape):
    mean, image = (0.48145466, 0.4578275, 0.40821073), noise(*shape)
    side = max(shape)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    found = images.squared(image, mean)
    assert found.shape == (side, side, 3)
    for y in range(side):
        for x in range(side):
            inside = 0 <= y - top < shape[0] and 0 <= x - left < shape[1]
            wanted = image[y - top, x - left].tolist() if inside else [122, 116, 104]
            assert found[y, x].tolist() == wanted


def test_the_aspect_decides_pixels_fingerprint_and_feature_cache(original):
    crop, pad = built(original), built(original, image_aspect="pad")
    wide, square = sample(noise(30, 60)), sample(noise(40, 40))
    assert not torch.equal(vision([wide], crop), vision([wide], pad))
    assert torch.equal(vision([square], crop), vision([square], pad))
    processor = pad.processor.image_processor
    padded = images.squared(wide.images_HWC[0], processor.image_mean)
    assert torch.equal(vision([wide], pad), processor([padded], return_tensors="pt")["pixel_values"])
    assert tower._key(crop, [-2]) != tower._key(pad, [-2])
    assert of(original) != of(original, image_aspect="pad")


def of(folder, **model):
    model = {"name_or_path": str(folder), **model} if folder else model
    return fingerprint(
        from_tree({"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}, "model": model})
    )


def test_the_fingerprint_knows_a_checkpoint_by_its_content(original, folder):
    assert of(original) == of(folder) == of(folder, hub=True)
    assert of(original) != of(original, attention="eager")
    assert of(original) != of(original, image_backend="torchvision")
    (folder / "chat_template.jinja").write_text("{{ other }}")
    assert of(original) != of(folder)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """Parts on disk, their configuration, and the models that they hold."""
    monkeypatch.setenv("LLAVA_CONFLICT_LAB_CACHE", str(tmp_path / "cache"))
    speaker, seer, projector = checkpoints.write_parts(tmp_path / "parts")
    places = {"language_model": "lm", "vision_tower": "tower", "projector": "mm_projector.safetensors"}
    return {key: str(tmp_path / "parts" / place) for key, place in places.items()}, speaker, seer, projector


def test_a_llava_from_parts_has_their_weights(whole):
    fields, speaker, seer, projector = whole
    llava = build(ModelConfig(**fields), "fp32")
    model = llava.model.model
    num_old = speaker.config.vocab_size
    for name, weight in speaker.model.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name][:num_old], weight), name
    assert torch.equal(llava.model.lm_head.weight[:num_old], speaker.lm_head.weight)
    for name, weight in seer.state_dict().items():
        assert torch.equal(model.vision_tower.state_dict()[name], weight), name
    layers = model.multi_modal_projector
    for old, new in (("0", layers.linear_1), ("2", layers.linear_2)):
        assert torch.equal(new.weight, projector[f"model.mm_projector.{old}.weight"])
        assert torch.equal(new.bias, projector[f"model.mm_projector.{old}.bias"])
    assert llava.model.config.image_token_id == num_old
    assert llava.prompter.image_tokens == checkpoints.IMAGE_TOKENS
    torch.testing.assert_close(llava.model.lm_head.weight[num_old], speaker.lm_head.weight.mean(dim=0))


def test_a_llava_from_parts_speaks_as_vicuna_and_ends_its_answers(whole):
    llava = build(ModelConfig(**whole[0]), "fp32")
    turns = [
        Turn(question="what is this ?\n<image>", answer="a cat"),
        Turn(question="where ?", answer="here"),
    ]
    text = llava.prompter.prompt(turns)
    assert text.startswith("A chat between a curious human and an artificial intelligence assistant.")
    assert text.endswith("questions. USER: <image>\nwhat is this ? ASSISTANT: a cat USER: where ? ASSISTANT:")
    assert llava.prompter.prompt(turns, "be brief").startswith("be brief USER: <image>\n")
    encoded = llava.prompter.encode(turns)
    answers = [t for t, told in zip(encoded.ids, encoded.supervised, strict=True) if told]
    assert answers.count(2) == 2
    assert encoded.ids[-1] == 2
    batch = train_batch([sample(noise(20, 50))], llava)
    assert torch.isfinite(llava.model(**batch.inputs()).logits).all()


def test_parts_are_put_together_once_and_known_by_their_content(whole, tmp_path):
    fields = whole[0]
    first = folder_of(ModelConfig(**fields))
    assert base_name(ModelConfig(**fields)) == str(first)
    stamp = (first / "config.json").stat().st_mtime_ns
    moved = shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    there = {key: place.replace("/parts/", "/moved/") for key, place in fields.items()}
    assert folder_of(ModelConfig(**there)) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert of(None, **fields) == of(None, **there) != of(None, **{**fields, "projector": ""})
    save_file(
        {**load_file(moved / "mm_projector.safetensors")}, moved / "mm_projector.safetensors", {"v": "2"}
    )
    assert of(None, **fields) != of(None, **there)
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_new_projector_is_always_the_same_one(whole, tmp_path, monkeypatch):
    fields = {**whole[0], "projector": ""}
    torch.manual_seed(5)
    one = build(ModelConfig(**fields), "fp32").model.model.multi_modal_projector.state_dict()
    monkeypatch.setenv("LLAVA_CONFLICT_LAB_CACHE", str(tmp_path / "other"))
    two = build(ModelConfig(**fields), "fp32").model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert one["linear_1.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_tower": ""}, "model.vision_tower: '' is not allowed; a LLaVA from parts names"),
        ({"name_or_path": "x"}, "model.name_or_path: 'x' is not allowed; leave it out beside parts"),
        (
            {"projector": "PLACE/mm_projector.bin"},
            "model.projector: .*mm_projector.bin is not a safetensors file",
        ),
        ({"projector": "PLACE/none"}, "none: no such file or folder"),
        ({"projector": "PLACE/lm"}, "model.projector: .* is not allowed; weights of two layers"),
        (
            {"vision_tower": "PLACE/lm"},
            "model.vision_tower: .* not allowed; a vision tower of type clip_.*llama$",
        ),
    ],
)
def test_parts_that_do_not_fit_are_told(change, expected, whole, tmp_path):
    (tmp_path / "parts" / "mm_projector.bin").write_bytes(b"")
    change = {key: place.replace("PLACE", str(tmp_path / "parts")) for key, place in change.items()}
    tree = {"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}
    with pytest.raises(UserError, match=expected):
        build(from_tree({**tree, "model": {**whole[0], **change}}).model, "fp32")


def test_a_tower_with_registers_whose_tokens_nobody_counts_is_refused(whole, tmp_path):
    path = tmp_path / "parts" / "tower" / "config.json"
    path.write_text(json.dumps({"model_type": "dinov2_with_registers"}))
    with pytest.raises(UserError, match="model.vision_tower: .* it is of type dinov2_with_registers$"):
        build(ModelConfig(**whole[0]), "fp32")


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {"image_processor_type": "OwlImageProcessor"},
        {**checkpoints.IMAGES, "auto_map": {"AutoImageProcessor": "owl.Owl"}, "image_processor_type": "Owl"},
    ],
)
def test_a_tower_without_an_image_processor_is_told_before_weights_are_written(
    tree, whole, tmp_path, monkeypatch
):
    path = tmp_path / "parts" / "tower" / "preprocessor_config.json"
    path.unlink()
    if tree:
        checkpoints.write_json(path, tree)
    monkeypatch.setattr("workloads.llava.parts._save", None)
    tower = whole[0]["vision_tower"]
    with pytest.raises(UserError) as error:
        folder_of(ModelConfig(**whole[0]))
    assert str(error.value).startswith(f"model.vision_tower: {tower} has no usable image processor: ")
    assert "\n" not in str(error.value)


def test_the_written_files_are_the_hubs(original):
    """The format that these tests stand on: names of weights and settings as llava-1.5-7b-hf has them."""
    names = {n for file in original.glob("*.safetensors") for n in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } <= names
    assert (
        identity(from_tree({"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}))[
            "image_processor"
        ]
        == "CLIPImageProcessorPil"
    )
