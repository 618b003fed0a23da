"""Writes adapter folders for tests: by PEFT itself, and by hand."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def in_language_model(leaves=LEAVES):
    """PEFT's pattern for linears of the language model alone."""
    return rf"model\.language_model\..*\.({'|'.join(leaves)})"


def draw(model, seed, std=0.3):
    """Random values for everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * std)


def peft_folder(model, folder, seed=0, leaves=LEAVES, **settings):
    """A LoRA trained (drawn) and saved by PEFT; returns PEFT's model, whose logits are the truth."""
    config = LoraConfig(target_modules=in_language_model(leaves), **settings)
    peft = get_peft_model(model, config).double().eval()
    draw(peft, seed)
    peft.save_pretrained(folder)
    return peft


def write_folder(folder, weights, **settings):
    """A folder with these weights (names after PEFT's prefix) and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": w.contiguous() for name, w in weights.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def add_plain(model, plain):
    """Fold (A, B, scale) by path into a base model: W + scale * B A."""
    with torch.no_grad():
        for path, (A, B, scale) in plain.items():
            linear = model.get_submodule(path)
            for o in range(B.shape[0]):
                for r in range(A.shape[0]):
                    linear.weight[o] += scale * B[o, r] * A[r]
    return model
