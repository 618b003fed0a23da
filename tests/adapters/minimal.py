"""The smallest configuration of every method, for tests that run over all of them; the one place to know a method.

A method that works with its own defaults, and at
most needs `tasks`, stands nowhere here.
"""

import dataclasses
import importlib
import json
from unittest.mock import patch

import torch

from tests.llava.sentences import write_encoder
from workloads import adapters
from workloads.adapters import icm_lora, lora
from workloads.adapters.base import Trace
from workloads.adapters.parts import experts
from workloads.config import methods

TASKS = ("general", "document")
QUESTIONS = ("what is this", "how many are there")

# Method -> settings that make it small or need no files.
SMALL = {
    "lora": {"rank": 2},
    "mole": {"rank_per_expert": 2, "router_grad": "scaled"},
    "meteora": {"rank_per_expert": 2},
}
# "method-variant" -> more settings on top, for methods that change their parts.
VARIANTS = {
    "branch_lora-task_routers": {"task_routers": True},
    "moa-frozen": {"rank_per_expert": 2, "train_loras": False},
    # Large enough to be computed with sorted tokens, if it had enough of them: `sorting_pays`.
    "mole-sorted": {"rank_per_expert": 12},
}
# What needs files: "method" or "method-variant" -> settings made in a folder for a model.
FILES = {
    "branch_lora-task_routers": lambda folder, model: {"encoder": encoder(folder)},
    "cl_moe": lambda folder, model: {"encoder": encoder(folder)},
    "disco": lambda folder, model: {"encoder": encoder(folder)},
    "hide_lora": lambda folder, model: {"encoder": encoder(folder)},
    "icm_lora": lambda folder, model: {"generator": generator(folder, model), "task": TASKS[0]},
    "meteora": lambda folder, model: {"folders": two_loras(folder, model)},
    "moa-frozen": lambda folder, model: {"folders": two_loras(folder, model)},
    "modal_prompt": lambda folder, model: {"encoder": encoder(folder)},
    "smolora": lambda folder, model: {"encoder": encoder(folder)},
}
# Methods that do not start at the base, and why.
NOT_AT_BASE = {
    "icm_lora": "its weights are generated, not trained from 0",
    "meteora": "its LoRAs are ready-made",
    "moa-frozen": "its LoRAs are ready-made",
    "modal_prompt": "its prompts are read from the first step on",
}


def cases():
    """All methods, and their variants."""
    return [*methods(), *sorted(VARIANTS)]


def make_config(case, folder, make_model):
    """The checked configuration of a case; what files it needs are written to `folder`, for `make_model()`."""
    name = case.partition("-")[0]
    kind = importlib.import_module(f"workloads.adapters.{name}").Config
    settings = {**SMALL.get(name, {}), **VARIANTS.get(case, {})}
    if "tasks" in {field.name for field in dataclasses.fields(kind)}:
        settings["tasks"] = list(TASKS)
    if case in FILES:
        folder.mkdir(parents=True, exist_ok=True)
        settings |= FILES[case](folder, make_model())
    config = kind(**settings)
    config.check()
    return config


def sorting_pays():
    """Inside, a few tokens are enough to be sorted by expert."""
    return patch.object(experts, "enough", return_value=True)


def encoder(folder):
    """A tiny sentence encoder."""
    return str(write_encoder(folder / "encoder"))


def plain_lora(folder, model, seed=0, **settings):
    """A trained (drawn) LoRA of `model`, saved as our `lora` saves it; the model keeps it."""
    config = lora.Config(**{"rank": 2, "alpha": 3.0, **settings})
    attached = lora.attach(model, config, Trace())
    draw(model, adapters.saved_names(model, attached), seed)
    adapters.save(folder, adapters.weights_of(model, attached), config, attached, "tiny")
    return attached


def two_loras(folder, model):
    """A LoRA folder for each task."""
    plain_lora(folder / TASKS[0], model, seed=1)
    weights = adapters.read(folder / TASKS[0])
    other = {name: weight.flip(-1) for name, weight in weights.items()}
    adapters.write(folder / TASKS[1], other, adapters.settings(folder / TASKS[0]))
    return {task: str(folder / task) for task in TASKS}


def generator(folder, model, seed=0):
    """A generator of LoRAs of `model` with random weights."""
    make_generator(folder, model, seed)
    return str(folder / "generator")


def make_generator(folder, model, seed=0):
    """The generator itself, for LoRAs that `folder / "lora"` has one of."""
    plain_lora(folder / "lora", model)
    weights = adapters.read(folder / "lora")
    layout = icm_lora.layout_of(weights)
    torch.manual_seed(seed)
    size = len(layout.flatten(weights))
    shape = icm_lora.Shape(num_numbers=size, condition=4, latent=5, channels=(3, 4), kernel=3)
    made = icm_lora.Generator(
        cvae=icm_lora.CVAE(shape),
        layout=layout,
        tasks=TASKS,
        conditions=torch.randn(len(TASKS), 4),
        mean=torch.randn(size) * 0.2,
        deviation=torch.rand(size) + 0.1,
        adapter=json.loads((folder / "lora" / "adapter_config.json").read_text()),
    )
    made.save(folder / "generator")
    return made


def draw(model, names, seed, std=0.2):
    """Random values for the parameters among `names`; buffers stay."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names:
                weight.copy_(torch.randn(weight.shape, generator=dice, dtype=weight.dtype) * std)


def attached(make_model, config, seed=0, tasks=TASKS):
    """A fresh base with the method on it, told of the batch."""
    model, trace = make_model(), Trace()
    torch.manual_seed(seed)
    described = adapters.attach(model, config, trace)
    trace.watch(model)
    trace.begin(QUESTIONS, tasks)
    return model, trace, described


def drawn(make_model, config, seed=3, tasks=TASKS):
    """The same with random weights, trained and frozen ones of the method alike."""
    model, trace, described = attached(make_model, config, tasks=tasks)
    draw(model, adapters.saved_names(model, described), seed)
    return model, trace, described


def loss_of(model, trace, described, batch):
    """The language model's loss and the method's own terms, as the loop adds them."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    total = model(**batch, labels=labels, use_cache=False).loss
    for term in described.losses(trace).values():
        total = total + term
    return total
