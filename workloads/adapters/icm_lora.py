"""ICM-LoRA: a conditional variational autoencoder writes the weights of a plain LoRA from a vector of the task.

Source:  Shao et al. 2025, ICM-LoRA, arXiv:2501.17635, and its released code: a LoRA's numbers in a row, padded to a
         multiple of 2^12, through 12 convolutions of stride 2 (kernel 7, channels 8 to 256 and back to 8).
Files:   `generator` is a folder that `python -m workloads.training.icm train` writes. What is saved is the generated
         LoRA as a plain `lora` adapter in PEFT's format; it needs the generator no more.
Differs: the generated weights stay as they are (a run trains the projector at most), and the model does not start at
         the base. The task vector, less the tasks' mean and over their spread, is joined to the encoder's last
         features and to the latent by one linear each; LeakyReLU(0.1) between convolutions, whose start keeps the
         signal's size; numbers are standardised by their own mean over the collected LoRAs and one deviation per
         tensor.

Shape letters: B LoRAs, N numbers of a LoRA padded, M positions after the last convolution, Z latent, D task vector.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workloads.adapters.base import Attached, Capabilities, Trace, freeze
from workloads.adapters.parts.placing import plain_form, put_lora
from workloads.config import AdapterConfig
from workloads.errors import UserError, require

VERSION = 1
WEIGHTS, SETTINGS = "generator.safetensors", "generator.json"
_FORMAT = 1
# Of the LeakyReLU between convolutions.
_SLOPE = 0.1
# Fields of adapter_config.json that are about one folder and not about the LoRA in it.
_OF_THE_FOLDER = ("schema_version", "base_model_name_or_path")


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """Which LoRA to generate; rank, scale and targets are those of the LoRAs that the generator has seen."""

    name: str = "icm_lora"
    # Folder of the generator.
    generator: str = ""
    # One of the generator's tasks.
    task: str = ""
    # Seed of the latent.
    draw: int = 0

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        require(self.generator != "", "adapter.generator", self.generator, "the folder of a generator")
        require(self.task != "", "adapter.task", self.task, "a task of the generator")
        require(0 <= self.draw < 2**63, "adapter.draw", self.draw, "from 0 to below 2**63")

    def files(self) -> list[Path]:
        """The files that the method starts from; their contents decide numbers, their places do not."""
        return [Path(self.generator) / name for name in (SETTINGS, WEIGHTS)]

    def without_files(self) -> "Config":
        """The settings without the generator's place; nothing is generated from them."""
        return replace(self, generator="")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The autoencoder's sizes; `num_numbers` is a LoRA's length before padding."""

    num_numbers: int
    condition: int
    latent: int = 64
    channels: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
    kernel: int = 7

    @property
    def padded(self) -> int:
        """The length after padding: a multiple of 2 to the number of convolutions."""
        step = 2 ** len(self.channels)
        return -(-self.num_numbers // step) * step


class CVAE(nn.Module):
    """Encoder and decoder of LoRAs (B, N) given conditions (B, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.kernel % 2 == 1, "an even kernel would not halve the length exactly"
        self.shape = shape
        self.end = (shape.channels[-1], shape.padded // 2 ** len(shape.channels))
        half: dict[str, Any] = {"kernel_size": shape.kernel, "stride": 2, "padding": shape.kernel // 2}
        ups = (*shape.channels[::-1][1:], 1)
        features = self.end[0] * self.end[1]
        self.down = nn.ModuleList(
            nn.Conv1d(a, b, **half) for a, b in zip((1, *shape.channels), shape.channels, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(a, b, output_padding=1, **half)
            for a, b in zip(shape.channels[::-1], ups, strict=True)
        )
        self.to_latent = nn.Linear(features + shape.condition, 2 * shape.latent)
        self.from_latent = nn.Linear(shape.latent + shape.condition, features)
        # Torch's default start shrinks the signal at each of the 24 layers until nothing is learned.
        for layer in (*self.down, *self.up):
            assert isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)
            inputs = layer.in_channels * shape.kernel / (1 if isinstance(layer, nn.Conv1d) else 2)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (1 + _SLOPE**2) / inputs))
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def encode(self, numbers_BN: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance (B, Z) of the latent."""
        x = numbers_BN.unsqueeze(1)
        for layer in self.down:
            x = F.leaky_relu(layer(x), _SLOPE)
        mean_BZ, log_variance_BZ = self.to_latent(torch.cat([x.flatten(1), condition_BD], dim=1)).chunk(
            2, dim=1
        )
        return mean_BZ, log_variance_BZ

    def decode(self, latent_BZ: Tensor, condition_BD: Tensor) -> Tensor:
        """Numbers (B, N)."""
        x = self.from_latent(torch.cat([latent_BZ, condition_BD], dim=1)).unflatten(1, self.end)
        for layer in self.up:
            x = layer(F.leaky_relu(x, _SLOPE))
        return x.squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and shapes of a LoRA's tensors in the order in which their numbers stand in a row."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """All numbers in fp32."""
        return torch.cat([weights[name].detach().float().flatten() for name in self.names])

    def unflatten(self, numbers: Tensor) -> dict[str, Tensor]:
        """The tensors again; numbers beyond the last tensor are padding."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = numbers[: sum(sizes)].split(sizes)
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def layout_of(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of a LoRA: its tensors in the order of their names."""
    names = tuple(sorted(weights))
    return Layout(names=names, shapes=tuple(tuple(weights[name].shape) for name in names))


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A trained autoencoder with all that turns its output into a LoRA."""

    cvae: CVAE
    layout: Layout
    # Tasks, and their vectors (tasks, D) as the autoencoder is given them.
    tasks: tuple[str, ...]
    conditions: Tensor
    # What standardising took away: the mean of every number, and a deviation (one per tensor, repeated).
    mean: Tensor
    deviation: Tensor
    # adapter_config.json of the LoRAs.
    adapter: Mapping[str, Any]

    @torch.no_grad()
    def draw(self, task: str, seed: int) -> dict[str, Tensor]:
        """The weights of a LoRA for `task`, from a standard normal latent."""
        require(
            task in self.tasks, "task", task, f"this generator's tasks: {', '.join(self.tasks)}", self.tasks
        )
        dice = torch.Generator().manual_seed(seed)
        latent_BZ = torch.randn(1, self.cvae.shape.latent, generator=dice)
        numbers_N = self.cvae.decode(latent_BZ, self.conditions[[self.tasks.index(task)]])[0]
        return self.layout.unflatten(numbers_N[: len(self.mean)] * self.deviation + self.mean)

    def save(self, folder: Path) -> None:
        """Write the generator to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        cvae = {f"cvae.{name}": w.detach().contiguous() for name, w in self.cvae.state_dict().items()}
        own = {"conditions": self.conditions, "mean": self.mean, "deviation": self.deviation}
        save_file({**cvae, **own}, folder / WEIGHTS)
        tree = {
            "format": _FORMAT,
            "version": VERSION,
            "shape": asdict(self.cvae.shape),
            "layout": [
                [name, list(shape)] for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
            ],
            "tasks": list(self.tasks),
            "adapter": dict(self.adapter),
        }
        (folder / SETTINGS).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def load_generator(folder: Path) -> Generator:
    """Read what `Generator.save` wrote; raises `UserError` when `folder` holds no generator of this version."""
    try:
        tree = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError):
        raise UserError(f"adapter.generator: {folder} holds no generator") from None
    found = (tree.get("format"), tree.get("version"))
    require(
        found == (_FORMAT, VERSION), "adapter.generator", str(folder), f"version {VERSION}, not {found[1]}"
    )
    shape = {**tree["shape"], "channels": tuple(tree["shape"]["channels"])}
    cvae = CVAE(Shape(**shape))
    own = {name: tensors.pop(name) for name in ("conditions", "mean", "deviation")}
    cvae.load_state_dict({name.removeprefix("cvae."): w for name, w in tensors.items()})
    names, shapes = zip(*tree["layout"], strict=True)
    return Generator(
        cvae=cvae.eval(),
        layout=Layout(names=names, shapes=tuple(tuple(shape) for shape in shapes)),
        tasks=tuple(tree["tasks"]),
        adapter=tree["adapter"],
        **own,
    )


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put the generated LoRA on it, frozen too: nothing of the adapter trains.

    Raises `UserError` when the generator is missing or made for another model.
    """
    config.check()
    generator = load_generator(Path(config.generator))
    lora = generator.adapter["method"]
    with torch.random.fork_rng(devices=[]):
        placed = put_lora(model, lora["targets"], lora["rank"], lora["alpha"], 0.0)
    freeze(model)
    weights = generator.draw(config.task, config.draw)
    own = {name: w for name, w in model.named_parameters() if ".lora_" in name}
    fits = {name: tuple(w.shape) for name, w in own.items()} == {
        n: tuple(w.shape) for n, w in weights.items()
    }
    require(fits, "adapter.generator", config.generator, "a generator for LoRAs of this model")
    with torch.no_grad():
        for name, w in own.items():
            w.copy_(weights[name])
    described = {key: value for key, value in generator.adapter.items() if key not in _OF_THE_FOLDER}

    return Attached(
        capabilities=Capabilities(mergeable=True),
        num_weights=0,
        num_active=0,
        state=frozenset(own),
        as_lora=plain_form(placed),
        exported={**described, "generated": asdict(config)},
    )
