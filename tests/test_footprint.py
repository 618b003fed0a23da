"""The formulas of memory hold at 7B against published counts, and on the pocket model against what is measured."""

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from tests.llava import checkpoints
from tests.llava.sentences import write_encoder
from tests.training.runs import MIX, do, do_stages, small, stages
from workloads import adapters, footprint, record
from workloads.adapters.base import Trace
from workloads.config import ModelConfig, from_tree
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.llava import tower
from workloads.llava.build import build
from workloads.run import _attached

# llava-1.5-7b-hf: Vicuna with 32,064 tokens, CLIP ViT-L/14-336, two projector layers; published as 7.06 B.
WHOLE, PROJECTOR = 7_063_427_072, 20_979_712
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000, "model_type": "llava",
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A folder with the config.json of llava-1.5-7b-hf and nothing else."""
    folder = tmp_path_factory.mktemp("seven")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def of(folder, adapter, **sections):
    tree = {"adapter": adapter, "data": {"mixture": {"general": 1.0}}, "model": {"name_or_path": str(folder)}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return from_tree(tree)


MOLE = {"name": "mole", "num_experts": 3, "rank_per_expert": 32}


@pytest.mark.parametrize(
    ("adapter", "published"),
    [
        (MOLE, 173.15e6),
        ({"name": "lora", "rank": 128}, 319.8e6),
        ({"name": "lora", "rank": 32}, 79.95e6),
        ({"name": "moe_lora", "rank_total": 128, "num_experts": 8}, 328.9e6),
    ],
)
def test_trained_weights_of_the_7b_model_are_the_published_ones(adapter, published, seven):
    sizes = footprint.counts(of(seven, adapter))
    assert sizes.trained - PROJECTOR == pytest.approx(published, rel=5e-4)
    assert sizes.frozen + PROJECTOR == WHOLE
    frozen = footprint.counts(of(seven, adapter, model={"train_projector": False}))
    assert frozen.trained == sizes.trained - PROJECTOR


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_worker_of_the_7b_model_holds_what_zero_shares(stage, dtype, seven):
    """Against Rajbhandari et al.'s accounting for mixed precision: 2, 2 and 12 bytes a weight, of which some shared."""
    execution = {"workers": 8, "zero_stage": stage, "micro_batch": 2, "eval_batch": 2}
    config = of(seven, MOLE, execution=execution, optim={"dtype": dtype})
    sizes = footprint.counts(config)
    trained, frozen, width = sizes.trained, WHOLE - PROJECTOR, {"fp32": 4, "bf16": 2}[dtype]
    found = footprint.memory(config, sizes)
    weights, gradients, optimizer = width * (frozen + trained), width * trained, 12 * trained
    if dtype == "bf16":
        gradients += 4 * trained / (8 if stage else 1)
    if stage >= 1:
        optimizer /= 8
    if stage >= 2:
        gradients -= width * trained * 7 / 8
    if stage == 3:
        weights /= 8
    if stage == 0 and dtype == "fp32":
        weights -= 4 * trained
    # Nobody shares buffers: 577 positions of the tower, the rotary embedding's 64 frequencies and what they were.
    weights += 577 * 8 + 2 * 64 * width
    assert found.weights == pytest.approx(weights, rel=1e-6)
    assert found.gradients == pytest.approx(gradients, rel=1e-6)
    assert found.optimizer == pytest.approx(optimizer, rel=1e-6)
    buckets = {0: 0, 1: 0.5e9, 2: 0.5e9, 3: 1.5e9}[stage]
    assert found.buffers == width * buckets
    assert found.total > found.weights + found.gradients + found.optimizer + found.buffers


def test_checkpointing_trades_the_blocks_for_their_inputs(seven):
    def found(**execution):
        config = of(seven, MOLE, execution={"micro_batch": 4, **execution}, data={"max_length": 700})
        return footprint.memory(config, footprint.counts(config))

    kept, again = found(), found(gradient_checkpointing=True)
    block = footprint.saved_by_a_block(footprint.counts(of(seven, MOLE)), 4) * 4 * 700
    assert kept.activations - again.activations == 31 * block - 32 * 4 * 700 * 4096 * 4
    assert (kept.weights, kept.optimizer, kept.answers) == (again.weights, again.optimizer, again.answers)
    assert found(micro_batch=8).activations == 2 * kept.activations
    assert found(eval_batch=200).answers == 2 * kept.answers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_optimizer_takes_what_the_formula_says(stage, dtype, tmp_path):
    config = small(
        "mole", data={"samples": 8}, eval={"samples": 2}, optim={"dtype": dtype}, execution={"zero_stage": stage}
    )  # fmt: skip
    do(config, tmp_path)
    (event,) = [event for event in record.read_events(tmp_path) if event["event"] == "eval"]
    wanted = footprint.memory(config, footprint.counts(config)).optimizer
    # Beside the three fp32 numbers a weight: a step count a tensor, and what fills partitions up.
    assert wanted <= event["optimizer_bytes"] <= wanted + 2000


class Kept:
    """Holds one tensor for autograd, as long as its graph lives."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved(forward, parameters):
    """Bytes that autograd keeps of `forward` beside parameters, every storage once; needs its result to be alive."""
    found = []

    def pack(tensor):
        held = Kept(tensor)
        found.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = forward()
    own = {weight.untyped_storage().data_ptr() for weight in parameters}
    live = [held().tensor.untyped_storage() for held in found if held() is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in live}
    assert result.requires_grad
    return sum(size for place, size in sizes.items() if place not in own)


# Experts also keep their sorted tokens, which the formula leaves out.
@pytest.mark.parametrize(("adapter", "tolerance"), [("lora", 0.03), ("mole", 0.1)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_autograd_keeps_what_the_formula_says(dtype, checkpointing, adapter, tolerance):
    samples, length = 4, 96
    config = small(
        adapter, data={"max_length": length}, optim={"dtype": dtype},
        execution={"micro_batch": samples, "gradient_checkpointing": checkpointing},
    )  # fmt: skip
    llava = build(config.model, dtype)
    _attached(config, llava, Trace())
    llava.model.train()
    ids_BT = torch.randint(8, 40, (samples, length), generator=torch.Generator().manual_seed(0))
    ids_BT[:, 1:65] = llava.model.config.image_token_id
    pixels = torch.zeros(samples, 3, 96, 96, dtype=llava.model.dtype)
    predicts_BT = torch.arange(length).expand(samples, -1) >= 65

    def forward():
        return llava.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), pixel_values=pixels, use_cache=False,
            logits_to_keep=predicts_BT,
        ).logits  # fmt: skip

    sizes = footprint.counts(config)
    supervised = samples * (length - sizes.image_tokens) * (8 + footprint.BYTES[dtype]) * sizes.vocabulary
    wanted = footprint.activations(config, sizes) - supervised
    if checkpointing:  # one block is computed again in backward
        wanted -= samples * length * footprint.saved_by_a_block(sizes, footprint.BYTES[dtype])
    assert saved(forward, llava.model.parameters()) == pytest.approx(wanted, rel=tolerance)


def test_the_frozen_tower_is_not_gone_back_through():
    config = small("lora", execution={"gradient_checkpointing": True})
    llava = build(config.model, "fp32")
    _attached(config, llava, Trace())
    llava.model.train()
    said = []
    tower = llava.model.get_submodule("model.vision_tower")
    tower.register_forward_hook(
        lambda module, args, output: said.append(output.last_hidden_state.requires_grad)
    )
    ids_BT = torch.full((1, 70), 9)
    ids_BT[:, 1:65] = llava.model.config.image_token_id
    llava.model(input_ids=ids_BT, pixel_values=torch.zeros(1, 3, 96, 96)).logits.sum().backward()
    assert said == [False]
    trained = [w for w in llava.model.parameters() if w.requires_grad]
    assert all(w.grad is not None for w in trained)


def test_the_flops_are_those_of_the_products(seven):
    """Against the usual 6 N T of training everything: frozen weights take 4, and 2 more to be computed again."""
    config = of(
        seven, {"name": "lora", "rank": 1}, model={"train_projector": False}, data={"max_length": 1000}
    )
    sizes = footprint.counts(config)
    tower = 2 * 576 * sizes.tower
    assert footprint.flops(config, sizes, 3) == pytest.approx(3 * (4 * 6.6e9 * 1000 + tower), rel=0.01)
    again = of(
        seven, {"name": "lora", "rank": 1}, model={"train_projector": False}, data={"max_length": 1000},
        execution={"gradient_checkpointing": True, "workers": 8}, optim={"global_batch": 16},
    )  # fmt: skip
    assert footprint.flops(again, sizes, 3) == pytest.approx(3 * (6 * 6.6e9 * 1000 + tower), rel=0.01)
    one, eight = (footprint.hours(c, sizes, 10**6, "A100") for c in (config, again))
    assert one / eight == pytest.approx(8 * 4 / 6, rel=0.01)


TASKS = list(MIX)
# Methods that keep frozen weights, buffers of the model's dtype, or whole numbers; and two that keep nothing.
KEEPING = {
    "lora": {"rank": 2},
    "mole": {"rank_per_expert": 2},
    "smora": {"rank_total": 4, "top_k": 2},
    "branch_lora": {"rank_total": 8, "num_branches": 4},
    "o_lora": {"rank_per_expert": 2, "tasks": TASKS},
    "sefe": {"rank_per_expert": 2, "tasks": TASKS},
    "hide_lora": {"rank_per_expert": 2, "tasks": TASKS},
    "disco": {"rank_per_expert": 2, "tasks": TASKS},
    "cl_moe": {"rank_total": 4, "tasks": TASKS},
    "modal_prompt": {"prompt_length": 2, "tasks": TASKS},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KEEPING)
def test_an_adapter_is_all_that_its_folder_holds_and_buffers_are_counted(name, dtype, encoder):
    fields = {"name": name, **KEEPING[name]}
    if name in ("hide_lora", "disco", "cl_moe", "modal_prompt"):
        fields["encoder"] = encoder
    config = of("pocket", fields, optim={"dtype": dtype}, execution={"checkpoint_every": 4})
    llava = build(config.model, dtype)
    attached = _attached(config, llava, Trace())
    sizes, own = footprint.counts(config), 0
    for weight in adapters.weights_of(llava.model, attached).values():
        own += weight.numel() * weight.element_size()
    trained = sum(weight.numel() for weight in llava.model.parameters() if weight.requires_grad)
    assert footprint.disk(config, sizes) == (own, 2 * (own + 12 * trained))
    buffers = [b.numel() * (4 if b.is_floating_point() else b.element_size()) for b in llava.model.buffers()]
    assert sizes.buffers.bytes("fp32") == sum(buffers)
    held = footprint.memory(config, sizes).weights
    bare = replace(sizes, buffers=footprint.Tensors(numbers=0, fixed=0), formed=0)
    assert held - footprint.memory(config, bare).weights == sizes.buffers.bytes(dtype) + sizes.formed


def test_every_stage_of_a_stream_leaves_the_formulas_bytes_on_disk(encoder, tmp_path):
    configs = stages(
        {name: {name: 1.0} for name in TASKS}, {}, "hide_lora",
        adapter_fields={"tasks": TASKS, "encoder": encoder}, data={"samples": 8}, eval={"samples": 1},
    )  # fmt: skip
    do_stages(configs, tmp_path)
    sizes = set()
    for config in configs:
        file = tmp_path / fingerprint(config) / record.ADAPTER / "adapter_model.safetensors"
        content = file.read_bytes()
        # A safetensors file is the length of its header in 8 bytes, the header with names and shapes, and the numbers.
        numbers = len(content) - 8 - int.from_bytes(content[:8], "little")
        assert footprint.disk(config, footprint.counts(config)) == (numbers, 0)
        sizes.add(numbers)
    assert len(sizes) == 1
    # One slot of three and the projector train.
    assert sizes.pop() > 4 * footprint.counts(configs[0]).trained


def test_next_checkpoints_and_folders_without_a_config_are_told(tmp_path):
    shape = {**CONFIG, "model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    sizes = footprint.counts(of(tmp_path, {"name": "lora", "rank": 128}))
    # One weight a dimension more: the newline.
    assert sizes.frozen + PROJECTOR == WHOLE + 4096
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"model.name_or_path: .* has no config.json"):
        footprint.counts(of(tmp_path, {"name": "lora"}))


def clip(folder):
    checkpoints.write_parts(folder)


def siglip(folder):
    checkpoints.write_parts(folder)
    shutil.rmtree(folder / "tower")
    SiglipVisionModel(SiglipVisionConfig(**shape())).save_pretrained(folder / "tower")
    about = {**checkpoints.IMAGES, "image_processor_type": "SiglipImageProcessor"}
    about["size"] = about["crop_size"]
    checkpoints.write_json(folder / "tower" / "preprocessor_config.json", about)


def dinov2(folder):
    checkpoints.write_parts(folder)
    shutil.rmtree(folder / "tower")
    Dinov2Model(Dinov2Config(**shape())).save_pretrained(folder / "tower")
    about = {**checkpoints.IMAGES, "image_processor_type": "BitImageProcessor"}
    checkpoints.write_json(folder / "tower" / "preprocessor_config.json", about)


def shape():
    return {key: value for key, value in checkpoints.vision_shape().items() if key != "projection_dim"}


@pytest.mark.parametrize("write", [clip, siglip, dinov2])
def test_a_row_of_features_takes_what_is_foretold_of_towers_with_and_without_a_class_token(
    write, tmp_path, monkeypatch
):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "cache"))
    write(tmp_path)
    parts = {"language_model": str(tmp_path / "lm"), "vision_tower": str(tmp_path / "tower")}
    cues = {"vce": True, "vce_levels": [-2, -3, -1], "vce_heads": 2}
    for dtype, model in (("fp32", parts), ("bf16", {**parts, **cues})):
        foretold = footprint.row_bytes(small(model=model, optim={"dtype": dtype}))
        llava = build(ModelConfig(**model), dtype)
        seer, side = tower.tower_of(llava), llava.model.config.vision_config.image_size
        with torch.no_grad():
            said = seer(
                torch.zeros(1, 3, side, side, dtype=seer.dtype), output_hidden_states=True
            ).hidden_states
        assert foretold == sum(said[k].nbytes for k in tower.levels_of(llava, model.get("vce_levels", [])))
