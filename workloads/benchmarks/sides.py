"""The two sides of a case, as functions that do one pass over a block or one training step.

Shape letters: B batch, T tokens, D width.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from workloads import adapters
from workloads.adapters.base import Attached, Trace
from workloads.benchmarks.cases import Case, Size
from workloads.benchmarks.peers import LoopBlock, StackBlock, peft_lora
from workloads.config import DataConfig, ModelConfig
from workloads.data import pool
from workloads.data.collate import Batch, train_batch
from workloads.data.pool import Pool
from workloads.llava import tower
from workloads.llava.build import Llava, build, train_projector
from workloads.training import loss

# Loading a model imports DeepSpeed, which otherwise says on stdout that it finds no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Width of a sentence vector of all-MiniLM-L6-v2.
_SENTENCE_WIDTH = 384


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A block with a method on it, and what the method's loss terms are read from."""

    mlp: nn.Module
    attached: Attached
    trace: Trace


def sides(case: Case, batch_size: int = 4) -> tuple[Callable[[], None], Callable[[], None]]:
    """Ours and the peer; `batch_size` is that of a training step. Raises `UserError` when PEFT is missing."""
    if case.peer == "tower_step":
        return whole_step(case.adapter, batch_size, True), whole_step(case.adapter, batch_size, False)
    if case.size is None:
        lora = {"name": "lora", "rank": case.peer_rank}
        return training_step(case.adapter, batch_size), training_step(lora, batch_size)
    ours, peer = blocks(case, case.size)
    x_BTD = torch.randn(case.size.samples, case.size.tokens, case.size.width)
    return block_pass(ours.mlp, x_BTD, ours), block_pass(peer, x_BTD, ours if case.peer == "loop" else None)


def blocks(case: Case, size: Size) -> tuple[Adapted, nn.Module]:
    """Our block, all its trained weights drawn at random, and the peer; `loop` and `stack` have the same weights."""
    ours = adapted(case.adapter, size)
    if case.peer == "loop":
        block: Any = ours.mlp
        return ours, LoopBlock(block)
    if case.peer == "stack":
        return ours, StackBlock(ours.mlp)
    peer = peft_lora(_mlp(one_block_llava(size)), case.peer_rank)
    _draw(peer)
    return ours, peer


def adapted(tree: dict[str, Any], size: Size) -> Adapted:
    """The method on a LLaVA of one block, told of a batch of `size` without images."""
    model, trace = one_block_llava(size), Trace()
    attached = _attached(model, tree, trace)
    trace.watch(model)
    trace.begin(["which one"] * size.samples, ["any"] * size.samples)
    _draw(model)
    with torch.no_grad():  # tells whatever pools which tokens there are
        model(input_ids=torch.ones(size.samples, size.tokens, dtype=torch.long), use_cache=False)
    trace.clear()
    return Adapted(mlp=_mlp(model), attached=attached, trace=trace)


def _attached(model: nn.Module, tree: dict[str, Any], trace: Trace) -> Attached:
    """The method on `model`; a sentence encoder that it needs is random, ready-made LoRAs are zero."""
    with TemporaryDirectory() as folder:
        files: dict[str, Any] = {}
        if tree["name"] == "smolora":
            files["encoder"] = _write_encoder(Path(folder))
        if tree["name"] == "meteora":
            files["folders"] = dict.fromkeys(tree["tasks"], folder)
        return adapters.attach(model, adapters.config_from_tree({**tree, **files}).without_files(), trace)


def one_block_llava(size: Size) -> LlavaForConditionalGeneration:
    """A LLaVA in fp32 with one decoder block of this size, and as little as possible of everything else."""
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=8,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=size.tokens,
    )
    make_config: Any = LlavaConfig
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        make_config(vision_config=vision, text_config=text, image_token_id=7, vision_feature_layer=-1)
    )
    return model.requires_grad_(False).train()


def block_pass(mlp: nn.Module, x_BTD: Tensor, terms: Adapted | None) -> Callable[[], None]:
    """Forward and backward of a block, with the loss terms of the method `terms` where it is given."""
    x_BTD = x_BTD.detach().clone().requires_grad_()
    probe_BTD = torch.randn_like(x_BTD)
    trained = [x_BTD, *(w for w in mlp.parameters() if w.requires_grad)]

    def once() -> None:
        for weight in trained:
            weight.grad = None
        out_BTD = mlp(x_BTD)
        losses = [] if terms is None else [*terms.attached.losses(terms.trace).values()]
        torch.autograd.backward([out_BTD, *losses], [probe_BTD, *(torch.ones_like(term) for term in losses)])
        if terms is not None:
            terms.trace.clear()

    return once


def training_step(tree: dict[str, Any], batch_size: int) -> Callable[[], None]:
    """A training step (forward, losses, backward, AdamW) of an adapter on the pocket model, its features cached."""
    llava, samples = _base(batch_size, cached=True)
    step = _stepper(llava, tree)
    batch = train_batch([samples.sample(i) for i in range(batch_size)], llava)
    return lambda: step(batch)


def whole_step(tree: dict[str, Any], batch_size: int, cached: bool) -> Callable[[], None]:
    """The same from the samples on, which are read and put into a batch each time; `cached` looks features up."""
    llava, samples = _base(batch_size, cached)
    step = _stepper(llava, tree)
    return lambda: step(train_batch([samples.sample(i) for i in range(batch_size)], llava))


def _base(num_samples: int, cached: bool) -> tuple[Llava, Pool]:
    """The pocket model, and samples with features or with pictures."""
    llava = build(ModelConfig(), "fp32")
    samples = pool.load(DataConfig(), "general", "train", llava.prompter)
    if cached:
        levels = tower.levels_of(llava, [])
        (samples,) = tower.with_features(llava, [samples], levels)
        tower.fill(llava, samples, range(num_samples), levels)
        tower.stand_in(llava, levels)
    return llava, samples


def _stepper(llava: Llava, tree: dict[str, Any]) -> Callable[[Batch], None]:
    trace = Trace()
    torch.manual_seed(0)
    attached = _attached(llava.model, tree, trace)
    train_projector(llava.model)
    trace.watch(llava.model)
    llava.model.train()
    adam = torch.optim.AdamW([w for w in llava.model.parameters() if w.requires_grad], lr=1e-3)

    def step(batch: Batch) -> None:
        batch.begin(trace)
        losses_N, _ = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        total = losses_N.mean()
        for term in attached.losses(trace).values():
            total = total + term
        total.backward()
        trace.clear()
        adam.step()
        attached.after_step(lambda part: part)
        adam.zero_grad()

    return step


def _mlp(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.language_model.layers.0.mlp")


def _draw(model: nn.Module) -> None:
    """Values for all trained weights: at their start B is 0, and so is much that would have to be computed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.02)


def _write_encoder(folder: Path) -> str:
    """A sentence encoder of MiniLM's width with random weights in `folder`; a pass finds its vectors ready."""
    shape = BertConfig(
        vocab_size=len(_SPECIAL),
        hidden_size=_SENTENCE_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    BertModel(shape).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(_SPECIAL)}).save_pretrained(folder)
    return str(folder)
