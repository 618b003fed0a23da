"""Small random parts of `smol`: a Llama and a DINOv2 in folders, a GGUF and an ONNX file of the packages' kinds."""

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from tests.llava import checkpoints

# ChatML, as SmolLM2 has it, with the end token of the small tokenizer.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'system\nhelp</s>\n' }}"
    "{% endif %}{{ message['role'] + '\n' + message['content'] + '</s>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_language_model(folder, layers=3, template=TEMPLATE, seed=0):
    """A Llama with tied embeddings and a chat template for messages of text."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    size = checkpoints.write_tokenizer(folder).get_vocab_size()
    shape = checkpoints.text_shape(size, layers=layers, spread=0.2)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    ).eval()
    model.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return model


def tower(mask_token=True, seed=1):
    """A DINOv2 of 2 blocks of width 128 for images of 56 px, all of its weights random."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        use_mask_token=mask_token,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def write_tower(folder, seed=1):
    model = tower(seed=seed)
    model.save_pretrained(folder)
    return model


def field(number, payload):
    """A field of a protocol-buffer message: a number, or bytes with their length."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value):
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def onnx_weight(name, array, packed=False):
    dims = (
        field(1, b"".join(varint(n) for n in array.shape))
        if packed
        else b"".join(field(1, n) for n in array.shape)
    )
    kind = {"float32": 1, "int64": 7}[str(array.dtype)]
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes()))


def onnx_node(kind, inputs, output):
    names = b"".join(field(1, name.encode()) for name in inputs) + field(2, output.encode())
    return field(1, names + field(3, b"a name") + field(4, kind.encode()))


def write_onnx(path, model, folder):
    """The tower under `backbone.` as exporters write it: linears transposed, nameless and apart from their biases."""
    model.save_pretrained(folder)  # whose names are those of published checkpoints
    weights = {name: w.numpy() for name, w in load_file(folder / "model.safetensors").items()}
    positions = weights.pop("embeddings.position_embeddings")
    graph = onnx_weight("onnx::Concat_1", positions[:, :1]) + onnx_weight("onnx::Reshape_2", positions[:, 1:])
    graph += onnx_weight("some.counts", np.arange(3)) + onnx_weight(
        "decoder.final.bias", np.ones(3, np.float32)
    )
    for number, (name, weight) in enumerate(sorted(weights.items())):
        if weight.ndim != 2:
            graph += onnx_weight(f"backbone.{name}", weight, packed=number % 2 == 0)
            continue
        graph += onnx_weight(f"onnx::MatMul_{number}", np.ascontiguousarray(weight.T))
        graph += onnx_node("MatMul", ["x", f"onnx::MatMul_{number}"], f"product_{number}")
        bias = f"backbone.{name.removesuffix('weight')}bias"
        graph += onnx_node("Add", [bias, f"product_{number}"], f"sum_{number}")
    graph += onnx_node("Reshape", ["onnx::Reshape_2", "some.counts"], "grid")
    graph += onnx_node("Concat", ["onnx::Concat_1", "grid"], "positions")
    path.write_bytes(field(1, 7) + field(2, b"a producer") + field(7, graph) + field(8, field(2, 14)))


def byte_tokenizer():
    """A byte-level BPE tokenizer in which some numbers are tokens of their own."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(["there are 12 cats and 12 dogs here 12"] * 4, trainer)
    return learner


def write_gguf(path, template=TEMPLATE):
    """A Llama in GGUF as llama.cpp converts it: queries and keys are permuted; returns model and tokenizer."""
    import json

    import gguf

    tokenizer = byte_tokenizer()
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get)
    torch.manual_seed(2)
    model = LlamaForCausalLM(
        LlamaConfig(
            **checkpoints.text_shape(len(tokens), width=64, layers=3), bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    out.add_token_merges([" ".join(pair) for pair in learned["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        out.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model, tokenizer
