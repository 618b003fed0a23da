"""Where base models are; loads without torch, so that fingerprints are cheap."""

from pathlib import Path

from workloads.errors import UserError

# The class is named, since the automatic choice depends on whether torchvision is installed.
IMAGE_PROCESSOR = "CLIPImageProcessorPil"
_POCKET = Path(__file__).parent.parent / "assets" / "base"


def resolve(name_or_path: str) -> Path:
    """The folder of a base model: the packaged one for `pocket`, else a local folder."""
    folder = _POCKET if name_or_path == "pocket" else Path(name_or_path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path: {name_or_path!r} is not allowed; 'pocket' or a model folder")
    return folder
