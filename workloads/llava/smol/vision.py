"""The vision tower of `smol`: a DINOv2-architecture ViT from a folder or an ONNX file, for images of 84 px.

Source:  Oquab et al. 2023, DINOv2, arXiv:2304.07193; transformers' `Dinov2Model`.
Differs: the table of positions is interpolated once to the 6 x 6 patches of an image, as the model would do at
         every image; the ONNX file has its linear weights transposed and without their names.

Shape letters: P patches, D width.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from workloads.errors import UserError, first_line, require
from workloads.llava import strict
from workloads.llava.smol import onnx
from workloads.llava.smol.places import VISION_TOWER, Place

IMAGE_SIZE = 84
# Every DINOv2 has attention heads of this width.
_HEAD = 64
_ROOT = "backbone."
# ImageNet's statistics, by which DINOv2 normalises.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(place: Place) -> Dinov2Model:
    """The tower in fp32 for images of `IMAGE_SIZE`; raises `UserError` when it is of another kind, or not whole."""
    whole = from_onnx(place.path) if place.path.is_file() else _from_folder(place.path)
    return resized(whole, IMAGE_SIZE)


def image_processor() -> BitImageProcessorPil:
    """Shorter side to `IMAGE_SIZE` (bicubic), middle square, ImageNet's mean and deviation."""
    make: Any = BitImageProcessorPil
    return make(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(_MEAN),
        image_std=list(_STD),
    )


def resized(model: Dinov2Model, side: int) -> Dinov2Model:
    """The same tower with its table of positions interpolated to square images of `side` px."""
    config: Any = model.config
    patch, option = config.patch_size, VISION_TOWER.option
    require(side % patch == 0, option, patch, f"a tower whose patches divide {side} px")
    weights = dict(model.state_dict())
    num_patches = (side // patch) ** 2
    stand_in_BPD = torch.empty(1, 1 + num_patches, config.hidden_size)
    with torch.no_grad():
        weights["embeddings.position_embeddings"] = model.embeddings.interpolate_pos_encoding(
            stand_in_BPD, side, side
        )
    return _filled(Dinov2Config(**{**config.to_dict(), "image_size": side}), weights)


def _filled(config: Dinov2Config, weights: dict[str, Tensor]) -> Dinov2Model:
    """A tower with exactly these weights, under their names in checkpoints or the model's own."""
    with torch.random.fork_rng():
        model = Dinov2Model(config)
    names = strict.own_names(weights, model)
    try:
        model.load_state_dict({names[name][0]: weight for name, weight in weights.items()}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{VISION_TOWER.option}: weights of another tower: {reason[:200]}") from None
    return model.eval()


def _from_folder(folder: Path) -> Dinov2Model:
    option = VISION_TOWER.option
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config: Any = AutoConfig.from_pretrained(folder, **options)
        kind = config.model_type
        require(kind == "dinov2", option, str(folder), f"a model of type dinov2; it is of type {kind}")
        loader: Any = Dinov2Model
        with torch.random.fork_rng():
            model, report = loader.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {folder}: {first_line(error)}") from None
    strict.loaded(option, folder, report)
    return model


def from_onnx(path: Path) -> Dinov2Model:
    """The tower under `backbone.` in an ONNX file, at the image size of its own table of positions."""
    graph = onnx.read(path)
    named = {name.removeprefix(_ROOT): w for name, w in graph.weights.items() if name.startswith(_ROOT)}
    weights = {**named, **_linears(graph), "embeddings.position_embeddings": _positions(graph, path)}
    patches_DCHW = weights.get("embeddings.patch_embeddings.projection.weight")
    fc1 = weights.get("encoder.layer.0.mlp.fc1.weight")
    if patches_DCHW is None or fc1 is None:
        raise UserError(f"{VISION_TOWER.option}: {path} holds no tower of DINOv2's architecture")
    width, channels, patch, _ = patches_DCHW.shape
    side = math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    layers = {match[1] for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD,
        mlp_ratio=len(fc1) // width,
        image_size=side * patch,
        patch_size=patch,
        num_channels=channels,
        use_mask_token=False,
    )
    return _filled(config, {name: torch.from_numpy(w.copy()) for name, w in weights.items()})


def _linears(graph: onnx.Graph) -> dict[str, np.ndarray]:
    """Linear weights: nameless in the file, they multiply what a named bias is then added to."""
    factors = {
        node.outputs[0]: graph.weights[node.inputs[1]]
        for node in graph.nodes
        if node.type == "MatMul" and node.inputs[1] in graph.weights
    }
    found: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        biases = [name for name in node.inputs if name.startswith(_ROOT) and name.endswith(".bias")]
        products = [name for name in node.inputs if name in factors]
        if node.type == "Add" and biases and products:
            name = biases[0].removeprefix(_ROOT).removesuffix("bias") + "weight"
            found[name] = factors[products[0]].T
    return found


def _positions(graph: onnx.Graph, path: Path) -> np.ndarray:
    """Positions (1, 1 + P, D): of the class token, and of the patches, which the graph interpolates."""
    used = [(node.type, name) for node in graph.nodes for name in node.inputs if name in graph.weights]
    nameless = [(kind, graph.weights[name]) for kind, name in used if not name.startswith(_ROOT)]
    first = [w for kind, w in nameless if kind == "Concat" and w.ndim == 3]
    rest = [w for kind, w in nameless if kind == "Reshape" and w.ndim == 3]
    if len(first) != 1 or len(rest) != 1:
        raise UserError(f"{VISION_TOWER.option}: {path} holds no tower of DINOv2's architecture")
    return np.concatenate([first[0], rest[0]], axis=1)
