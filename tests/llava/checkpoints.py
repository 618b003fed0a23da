"""Small random checkpoints in exactly the formats of llava-1.5-7b-hf and llava-v1.6-vicuna-7b-hf, and parts."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (  # fmt: skip
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

# The chat template of llava-1.5-7b-hf.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGE_SIZE, PATCH_SIZE = 28, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
# The grids of llava-v1.6 in units of a tile.
GRIDS = [[IMAGE_SIZE * high, IMAGE_SIZE * wide] for high, wide in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
TEXT = (
    "a USER: a ASSISTANT: what is this ? which side is the mark on ? where is it ? top left bottom right boot bag "
    "A cat. It is a cat on a mat, and the dog sits there. a chat between a curious human and an assistant."
)
IMAGES = {
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": IMAGE_SIZE},
}


def write_json(path, tree):
    path.write_text(json.dumps(tree, indent=2))


def write_tokenizer(folder, *added):
    """A Llama tokenizer (BPE with bytes to fall back on, a leading <s>) of about 400 tokens, and the `added` ones."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learner.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {token: k for k, token in enumerate([*special, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(special[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left", "tokenizer_class": "LlamaTokenizer",
        **({"pad_token": "<pad>"} if "<pad>" in added else {}),
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", about)
    return tokenizer


def text_shape(num_tokens, width=32, layers=2, spread=0.02):
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": num_tokens, "rms_norm_eps": 1e-05,
        "initializer_range": spread,
    }  # fmt: skip


def vision_shape(width=16):
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 24,
    }  # fmt: skip


def write(folder, seed=0, width=32, layers=2, spread=0.02, ends=2, dtype=torch.float16):
    """A LLaVA-1.5 in the format of the hub: its names of weights, two files with an index, its processor's files.

    `spread` is the deviation of the language model's weights, `ends` the ids that end an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, "<image>", "<pad>").get_vocab_size()
    rows = -(-size // 64) * 64
    ids = {"image_token_index": size - 2, "pad_token_id": size - 1}
    shared = {
        **ids, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip
    text, vision = text_shape(rows, width, layers, spread), vision_shape()
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "model_type": "llava",
        "torch_dtype": "float16", "text_config": {"model_type": "llama", **text}, "vocab_size": rows,
        "vision_config": {"model_type": "clip_vision_model", **vision}, **shared,
    })  # fmt: skip
    write_json(
        folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": size - 1}
    )
    write_json(folder / "preprocessor_config.json", {**IMAGES, "processor_class": "LlavaProcessor"})
    write_json(folder / "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH_SIZE,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
    })  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(seed)
    shared["image_token_id"] = shared.pop("image_token_index")
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), **shared)
    )
    write_weights(folder, {hub_name(name): w.to(dtype) for name, w in model.state_dict().items()})
    return folder


def write_next(folder, seed=0, spread=0.02, ends=2):
    """A LLaVA-NeXT in the format of llava-v1.6-vicuna-7b-hf: that of LLaVA-1.5 with grids of tiles and a newline."""
    write(folder, seed, spread=spread, ends=ends)
    tree = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {
        **tree, "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": GRIDS, "use_image_newline_parameter": True,
    })  # fmt: skip
    about = {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    extra = {"aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": GRIDS}
    write_json(folder / "preprocessor_config.json", {**IMAGES, **about, **extra})
    tree = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "processor_config.json", {**tree, "processor_class": "LlavaNextProcessor"})
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_pretrained(folder))
    write_weights(folder, {hub_name(name): w.half() for name, w in model.state_dict().items()})
    return folder


def hub_name(name):
    """A weight's name in llava-1.5-7b-hf and llava-v1.6-vicuna-7b-hf."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("lm_head.", "language_model.lm_head.")


def write_weights(folder, weights):
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name].contiguous() for name in held}, folder / file, {"format": "pt"})
    places = {name: file for file, held in files.items() for name in held}
    total = sum(w.nbytes for w in weights.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )


def write_parts(folder, seed=0):
    """A language model and a vision tower as their own folders, and a projector as LLaVA's release names it."""
    torch.manual_seed(seed)
    speaks, sees = folder / "lm", folder / "tower"
    speaks.mkdir(parents=True)
    size = write_tokenizer(speaks).get_vocab_size()
    speaker = LlamaForCausalLM(LlamaConfig(**text_shape(size), bos_token_id=1, eos_token_id=2))
    speaker.save_pretrained(speaks)
    seer = CLIPVisionModel(CLIPVisionConfig(**vision_shape()))
    seer.save_pretrained(sees)
    write_json(sees / "preprocessor_config.json", IMAGES)
    projector = {
        "model.mm_projector.0.weight": torch.randn(32, 16), "model.mm_projector.0.bias": torch.randn(32),
        "model.mm_projector.2.weight": torch.randn(32, 32), "model.mm_projector.2.bias": torch.randn(32),
    }  # fmt: skip
    save_file(projector, folder / "mm_projector.safetensors")
    return speaker, seer, projector
