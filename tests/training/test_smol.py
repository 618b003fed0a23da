"""`prepare smol` on tiny parts: only the projector learns, the folder is a base like any other, runs work on it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from orchestrator.__main__ import app
from tests.llava import smol_parts as parts
from tests.training.runs import do, small
from workloads import record
from workloads.config import ModelConfig
from workloads.data.cache import ENVIRONMENT_KEY, cache_dir
from workloads.data.pocket import DOMAINS, QUESTIONS, compose
from workloads.data.sources import pocket
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.llava import folder as folders
from workloads.llava.build import build
from workloads.training import smol

WORDS = ("prepare", "smol", "--steps", "2")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A cache with `smol` made of tiny parts by the command, the parts, and what it printed."""
    folder = tmp_path_factory.mktemp("smol")
    whole = parts.write_language_model(folder / "lm", layers=9)
    tower = parts.write_tower(folder / "tower")
    with pytest.MonkeyPatch.context() as patch:
        for domain in DOMAINS:
            for split in ("train", "val"):
                pocket.load(domain, split)
        pictures = cache_dir() / "pocket"
        (folder / "cache").mkdir()
        (folder / "cache" / "pocket").symlink_to(pictures)
        patch.setenv(ENVIRONMENT_KEY, str(folder / "cache"))
        done = CliRunner().invoke(app, [*WORDS, "--lm", str(folder / "lm"), "--tower", str(folder / "tower")])
        assert done.exit_code == 0, (done.output, done.exception)
        yield folder, whole, tower, done.stdout.splitlines()


def test_the_name_leads_to_the_folder_that_is_printed(prepared):
    _, _, _, lines = prepared
    assert lines[-1] == str(folders.resolve("smol"))


def held(whole, tower, model):
    """Names of the language model's and the tower's weights that are not those of the parts."""
    rows, changed = whole.config.vocab_size, set()
    for name, weight in model.model.language_model.state_dict().items():
        own = weight[:rows] if name == "embed_tokens.weight" else weight
        changed |= set() if torch.equal(own, whole.model.state_dict()[name]) else {name}
    for name, weight in model.model.vision_tower.state_dict().items():
        if name != "embeddings.position_embeddings":
            changed |= set() if torch.equal(weight, tower.state_dict()[name]) else {name}
    return changed


def test_of_a_cut_language_model_what_is_left_of_its_blocks_has_learned(prepared):
    _, whole, tower, _ = prepared
    model = build(ModelConfig(name_or_path="smol"), "fp32").model
    assert model.config.text_config.num_hidden_layers == 8
    names = set(model.model.language_model.state_dict()) - {"embed_tokens.weight"}
    assert held(whole, tower, model) == names
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == set("01234567")


def test_a_whole_language_model_stays_as_it_is(prepared):
    folder, whole, tower, _ = prepared
    given = {"--lm": str(folder / "lm"), "--tower": str(folder / "tower")}
    smol.prepare(given, 30, smol.Recipe(num_steps=1), False, "a test", lambda text: None)
    model = build(ModelConfig(name_or_path="smol-30"), "fp32").model
    assert model.config.text_config.num_hidden_layers == 9
    assert not held(whole, tower, model)


def test_the_card_states_recipe_parts_and_losses(prepared):
    folder, _, _, _ = prepared
    card = json.loads((folders.resolve("smol") / "card.json").read_text())
    assert card["recipe"]["num_steps"] == 2
    assert card["layers"] == 8
    sources = {key: part["source"] for key, part in card["parts"].items()}
    assert sources == {"language_model": str(folder / "lm"), "vision_tower": str(folder / "tower")}
    assert all(len(part["hash"]) == 16 for part in card["parts"].values())
    for key in ("caption_loss_val", "caption_loss_val_images_shuffled", "caption_exact_match_val"):
        assert set(card[key]) == set(DOMAINS)
    assert str(folder / "lm") in card["command"]


def test_the_same_parts_and_recipe_are_not_made_again(prepared):
    folder, _, _, _ = prepared
    stamp = (folders.resolve("smol") / "model.safetensors").stat().st_mtime_ns
    words = [*WORDS, "--lm", str(folder / "lm"), "--tower", str(folder / "tower")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (folders.resolve("smol") / "model.safetensors").stat().st_mtime_ns == stamp


def test_made_anew_it_has_the_same_weights(prepared, tmp_path, monkeypatch):
    folder, _, _, _ = prepared
    first = (folders.resolve("smol") / "model.safetensors").read_bytes()
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path))
    given = {"--lm": str(folder / "lm"), "--tower": str(folder / "tower")}
    made = smol.prepare(given, 8, smol.Recipe(num_steps=2), False, "a test", lambda text: None)
    assert made.parent == tmp_path / "smol"
    assert (made / "model.safetensors").read_bytes() == first


def test_a_folder_that_is_not_whole_is_not_taken_for_the_pair(prepared, tmp_path, monkeypatch):
    folder, _, _, _ = prepared
    given = {"--lm": str(folder / "lm"), "--tower": str(folder / "tower")}
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path))

    def make(made, *_):
        """Meanwhile another process leaves half a folder."""
        for place, name in ((made, "config.json"), (tmp_path / "smol" / made.name, "model.safetensors")):
            place.mkdir()
            (place / name).write_text("{}")

    monkeypatch.setattr(smol, "_make", make)
    with pytest.raises(UserError, match=f"^{ENVIRONMENT_KEY}: cannot write .*Directory not empty"):
        smol.prepare(given, 8, smol.Recipe(num_steps=2), False, "a test", lambda text: None)
    assert not (tmp_path / "smol" / "smol.txt").exists()


@pytest.mark.parametrize("vce", [False, True])
def test_a_run_on_it_learns_and_features_change_nothing(vce, prepared, tmp_path):
    model = {"name_or_path": "smol", "vce": vce, "vce_heads": 4, "vce_levels": [-2, -1, -3]}
    data = {"samples": 8, "max_length": 400}
    results = []
    for cached in (False, True):
        config = small(
            "mole", model=model, data=data, eval={"samples": 2}, execution={"feature_cache": cached}
        )
        result, reports = do(config, tmp_path / str(cached))
        assert [r["loss"] for r in reports if r["event"] == "train"]
        results.append((result.scores, result.train_loss, result.fingerprint))
    assert results[0] == results[1]
    assert result.identity["image_processor"] == "BitImageProcessorPil"
    tree = json.loads((tmp_path / "True" / record.ADAPTER / "adapter_config.json").read_text())
    assert tree["base_model_name_or_path"] == "smol"


def test_its_fingerprint_is_that_of_its_folder(prepared):
    named = small(model={"name_or_path": "smol"})
    placed = small(model={"name_or_path": str(folders.resolve("smol"))})
    assert fingerprint(named) == fingerprint(placed) != fingerprint(small())


def test_a_few_steps_lower_the_loss_of_captions(prepared):
    llava = build(ModelConfig(name_or_path="smol"), "fp32")
    first = smol.train(smol.Recipe(num_steps=1, batch=8, threads=1), llava, blocks=False)
    llava = build(ModelConfig(name_or_path="smol"), "fp32")
    later = smol.train(smol.Recipe(num_steps=30, batch=8, report_every=5, threads=1), llava, blocks=False)
    assert later < first - 0.1


def test_in_bfloat16_products_are_rounded_and_weights_are_not(prepared):
    losses, shifts = {}, {}
    for bf16 in (False, True):
        llava = build(ModelConfig(name_or_path="smol"), "fp32")
        weight = llava.model.model.multi_modal_projector.linear_2.weight
        losses[bf16] = smol.train(smol.Recipe(num_steps=1, batch=8, threads=1, bf16=bf16), llava, blocks=True)
        assert {w.dtype for w in llava.model.parameters()} == {torch.float32}
        shifts[bf16] = weight.detach().clone()
    assert losses[True] != losses[False]
    # A product of bfloat16 is rounded by at most 2^-8 of its terms.
    assert losses[True] == pytest.approx(losses[False], rel=2**-8)
    assert not torch.equal(shifts[True], shifts[True].bfloat16().float())


@pytest.mark.parametrize("domain", DOMAINS)
def test_captions_and_questions_never_word_counts_places_and_sides(domain):
    told = [smol.sample(domain, smol.Recipe(), i, "train") for i in range(60)]
    asked = {turn.question for s in told for turn in s.turns}
    assert not asked & {QUESTIONS[kind] for kind in ("count", "side", "where")}
    assert QUESTIONS["name"] in asked
    for index, s in enumerate(told):
        scene = compose(domain, "train", 3000, index)
        own = {pair.question: pair.answer for pair in scene.qa}
        assert all(own[turn.question] == turn.answer for turn in s.turns[1:])
        if scene.facts.layout == "single":
            assert scene.facts.name in s.turns[0].answer
        if scene.facts.layout == "word":
            assert s.turns[0].answer == f"the word {scene.facts.name}"


def test_pictures_are_never_repeated_and_never_the_benchmarks():
    recipe = smol.Recipe(num_steps=4, batch=12)
    shown = [s.images_HWC[0].tobytes() for batch in smol.batches(recipe) for s in batch]
    benchmark = {compose(domain, "train", 0, i).image.tobytes() for domain in DOMAINS for i in range(48)}
    assert len(shown) == len(set(shown)) == 48
    assert len(benchmark) == 48 * len(DOMAINS)
    assert not benchmark & set(shown)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prepare", "smoll"], ("NAME: 'smoll'", "did you mean 'smol'")),
        (["prepare", "smol", "--layers", "9"], ("--layers: 9", "8, 30")),
        (["prepare", "smol", "--steps", "-1"], ("--steps: -1",)),
        (["prepare", "smol", "--lm", "nowhere"], ("--lm: 'nowhere'",)),
    ],
)
def test_a_mistake_is_one_line(words, expected):
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in expected)
