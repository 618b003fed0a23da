"""The adapter of a finished run for other software: its own folder, a LoRA in PEFT's format, or a merged model."""

import shutil
from pathlib import Path
from typing import Literal

from workloads import adapters, identity, record
from workloads.adapters.base import Attached
from workloads.config import ModelConfig, from_tree
from workloads.errors import UserError
from workloads.llava.build import Llava, base_name, build, folder_of

Form = Literal["adapter", "peft", "merged"]
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def export(run: Path, out: Path, form: Form, task: str | None = None) -> None:
    """Write the adapter of the finished `run` to the new folder `out`; `task` where a method has one LoRA a task.

    Whatever the form, the adapter is first restored on its base, with strict names and shapes. Raises `UserError`
    when the base is another one than in training, when `out` holds something, or when the method has no such form.
    """
    saved = record.load(run)
    config = from_tree(saved.config)
    name = base_name(config.model)
    if identity.model_hash(config.model) != saved.identity["model"]:
        raise UserError(f"model.name_or_path: {name} is not the base that {run.name} was trained on any more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} holds something already; name a new folder")
    llava = build(config.model, "fp32")
    attached, _ = adapters.load(llava.model, run / record.ADAPTER)
    match form:
        case "adapter":
            shutil.copytree(run / record.ADAPTER, out, dirs_exist_ok=True)
        case "peft":
            adapters.export(out, llava.model, attached, name, task)
        case "merged":
            _merge(llava, attached, out, config.model, task)


def _merge(llava: Llava, attached: Attached, out: Path, model: ModelConfig, task: str | None) -> None:
    """A whole LLaVA checkpoint with the adapter folded in."""
    if model.vce:
        raise UserError("adapter: cannot be merged: a plain LLaVA has no place for the model's VCE")
    adapters.merge(llava.model, attached, task)
    llava.model.save_pretrained(out)
    # A loaded processor cannot be written again, so its files are taken from the base.
    for path in folder_of(model).iterdir():
        if path.name in PROCESSOR_FILES:
            shutil.copyfile(path, out / path.name)
