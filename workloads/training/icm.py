"""ICM-LoRA's pipeline: collect LoRAs of each task, train the autoencoder that writes them, generate new ones.

    python -m workloads.training.icm collect  --start RUN/adapter --domains general --out LORAS/general
    python -m workloads.training.icm train    --loras LORAS --out GENERATOR
    python -m workloads.training.icm generate --generator GENERATOR --task general --out ADAPTER
    orchestrator run pocket adapter.name=icm_lora adapter.generator=GENERATOR adapter.task=general

Source:  ICM-LoRA, arXiv:2501.17635: MSE + 0.005 KL(N(mean, variance) || N(0, 1)); task vector: mean of the last
         layer's last state over 30 samples.
Differs: the collected LoRAs are stops on one further walk from a trained LoRA, at a small constant learning rate. The
         loss skips padding; the KL term is summed over the latent and averaged over samples. The task vector is
         taken from the base without adapter, after its last norm, at the end of the prompt.

Shape letters: B LoRAs, N numbers of a LoRA padded, Z latent, D width of the language model.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from workloads import adapters
from workloads.adapters.icm_lora import CVAE, Generator, Layout, Shape, layout_of, load_generator
from workloads.config import DataConfig, ModelConfig
from workloads.data import pool
from workloads.data.collate import prompt_batch, train_batch
from workloads.data.pool import Pool, Sample
from workloads.errors import UserError, require
from workloads.llava.build import Llava, build
from workloads.training import loss

_TASK = "task.safetensors"


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How LoRAs of one task are collected."""

    source: str = "pocket"
    num_loras: int = 40
    # Optimizer steps between two collected LoRAs.
    every: int = 5
    batch: int = 16
    lr: float = 1e-4
    # Samples behind the task vector.
    num_samples: int = 30
    max_length: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the autoencoder is trained."""

    latent: int = 64
    steps: int = 500
    batch: int = 8
    lr: float = 1e-3
    kl_weight: float = 0.005
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Collected:
    """LoRAs of some tasks in one layout."""

    layout: Layout
    tasks: tuple[str, ...]
    # Task vectors (tasks, D), and all LoRAs (B, numbers) with the index of their task (B).
    vectors: Tensor
    numbers: Tensor
    owners: Tensor
    # adapter_config.json of the LoRAs.
    adapter: Mapping[str, Any]


@torch.no_grad()
def task_vector(llava: Llava, samples: Sequence[Sample]) -> Tensor:
    """Mean (D) over samples of the last state at the end of the prompt, in fp32."""
    batch = prompt_batch(samples, llava)
    states_BTD = llava.model.model(**batch.inputs(), use_cache=False).last_hidden_state
    return states_BTD[:, -1].float().mean(dim=0)


def collect(start: Path, domains: Sequence[str], out: Path, plan: Collecting) -> None:
    """Train the LoRA in `start` on, and save it now and then under `out`, beside the task vector of `domains`."""
    adapter = _plain_lora(start)
    llava = build(ModelConfig(name_or_path=adapter["base_model_name_or_path"]), "fp32")
    data = DataConfig(source=plan.source, max_length=plan.max_length)
    pools = [pool.load(data, domain, "train", llava.prompter) for domain in domains]
    out.mkdir(parents=True, exist_ok=True)
    vector = task_vector(llava, [_turn(pools, i) for i in range(plan.num_samples)])
    save_file({"vector": vector}, out / _TASK)
    attached, _ = adapters.load(llava.model, start)
    names = adapters.saved_names(llava.model, attached)
    trained = {name: w for name, w in llava.model.named_parameters() if name in names}
    adam = torch.optim.AdamW(trained.values(), lr=plan.lr, weight_decay=0.0)
    dice = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(pools) * min(len(p.accepted) for p in pools), generator=dice).tolist()
    llava.model.train()
    for step in range(1, plan.num_loras * plan.every + 1):
        first = (step - 1) * plan.batch
        chosen = [order[(first + i) % len(order)] for i in range(plan.batch)]
        batch = train_batch([_turn(pools, i) for i in chosen], llava)
        losses_N, _ = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        losses_N.mean().backward()
        adam.step()
        adam.zero_grad()
        if step % plan.every == 0:
            adapters.write(out / f"{step // plan.every:04d}", trained, adapter)


def _turn(pools: Sequence[Pool], index: int) -> Sample:
    """Sample `index` of pools that take turns."""
    mine = pools[index % len(pools)]
    return mine.sample(mine.accepted[index // len(pools)])


def _plain_lora(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder that holds a `lora` and nothing else."""
    tree = adapters.settings(folder)
    name = tree.get("method", {}).get("name", "none")
    require(name == "lora", f"{folder}: method", name, "lora")
    alone = all(".lora_" in weight for weight in adapters.read(folder))
    require(
        alone and "vce" not in tree,
        str(folder),
        "more than a LoRA",
        "train it with model.train_projector=false",
    )
    return tree


def read_collected(folder: Path) -> Collected:
    """All LoRAs under `folder`, which has a folder per task as `collect` writes it; raises `UserError`."""
    tasks = sorted(path.parent.name for path in folder.glob(f"*/{_TASK}"))
    if not tasks:
        raise UserError(f"{folder}: holds no tasks; `collect` writes one")
    found = [(i, path) for i, task in enumerate(tasks) for path in sorted((folder / task).glob("*/"))]
    if not found:
        raise UserError(f"{folder}: holds no LoRAs")
    adapter, layout = _plain_lora(found[0][1]), layout_of(adapters.read(found[0][1]))
    rows: list[Tensor] = []
    for _, path in found:
        weights = adapters.read(path)
        same = layout_of(weights) == layout and _plain_lora(path)["method"] == adapter["method"]
        require(same, str(path), "another kind of LoRA", f"all have to be like {found[0][1]}")
        rows.append(layout.flatten(weights))
    return Collected(
        layout=layout,
        tasks=tuple(tasks),
        vectors=torch.stack([load_file(folder / task / _TASK)["vector"] for task in tasks]),
        numbers=torch.stack(rows),
        owners=torch.tensor([i for i, _ in found]),
        adapter=adapter,
    )


def standardised(numbers: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """LoRAs (B, numbers) less their mean, over one deviation per tensor; then that mean, and each number's deviation.

    A tensor in which all LoRAs agree keeps the deviation 1.
    """
    mean = numbers.mean(dim=0)
    sizes = [torch.Size(shape).numel() for shape in layout.shapes]
    parts = (numbers - mean).split(sizes, dim=1)
    spreads = [part.square().mean().sqrt() for part in parts]
    deviation = torch.cat(
        [torch.where(s > 0, s, torch.ones_like(s)).repeat(n) for s, n in zip(spreads, sizes, strict=True)]
    )
    return (numbers - mean) / deviation, mean, deviation


def vae_loss(
    target_BN: Tensor, output_BN: Tensor, mean_BZ: Tensor, log_variance_BZ: Tensor, kl_weight: float
) -> Tensor:
    """Mean squared error plus the weighted KL divergence of N(mean, variance) from N(0, 1)."""
    kl_B = 0.5 * (mean_BZ.square() + log_variance_BZ.exp() - 1 - log_variance_BZ).sum(dim=1)
    return F.mse_loss(output_BN, target_BN) + kl_weight * kl_B.mean()


def train(collected: Collected, plan: Training, shape: Shape | None = None) -> tuple[Generator, list[float]]:
    """Train the autoencoder; returns the generator and the loss of every step. `shape` replaces the paper's sizes."""
    torch.manual_seed(plan.seed)
    rows_BN, mean, deviation = standardised(collected.numbers, collected.layout)
    num_numbers, width = rows_BN.shape[1], collected.vectors.shape[1]
    cvae = CVAE(shape or Shape(num_numbers=num_numbers, condition=width, latent=plan.latent))
    padded_BN = F.pad(rows_BN, (0, cvae.shape.padded - num_numbers))
    conditions, _, _ = standardised(collected.vectors, Layout(names=("vector",), shapes=((width,),)))
    adam = torch.optim.Adam(cvae.parameters(), lr=plan.lr)
    losses: list[float] = []
    for _ in range(plan.steps):
        chosen = torch.randint(len(padded_BN), (plan.batch,))
        condition_BD = conditions[collected.owners[chosen]]
        mean_BZ, log_variance_BZ = cvae.encode(padded_BN[chosen], condition_BD)
        latent_BZ = mean_BZ + (0.5 * log_variance_BZ).exp() * torch.randn_like(mean_BZ)
        output_BN = cvae.decode(latent_BZ, condition_BD)[:, :num_numbers]
        total = vae_loss(rows_BN[chosen], output_BN, mean_BZ, log_variance_BZ, plan.kl_weight)
        adam.zero_grad()
        total.backward()
        adam.step()
        losses.append(float(total.detach()))
    generator = Generator(
        cvae=cvae.eval(),
        layout=collected.layout,
        tasks=collected.tasks,
        conditions=conditions,
        mean=mean,
        deviation=deviation,
        adapter=collected.adapter,
    )
    return generator, losses


def generate(generator: Path, task: str, seed: int, out: Path) -> None:
    """Write a generated LoRA as a plain `lora` adapter in PEFT's format."""
    loaded = load_generator(generator)
    adapters.write(out, loaded.draw(task, seed), loaded.adapter)


def main() -> None:
    """One step of the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("collect")
    one.add_argument("--start", type=Path, required=True)
    one.add_argument("--domains", nargs="+", required=True)
    two = steps.add_parser("train")
    two.add_argument("--loras", type=Path, required=True)
    three = steps.add_parser("generate")
    three.add_argument("--generator", type=Path, required=True)
    three.add_argument("--task", required=True)
    three.add_argument("--seed", type=int, default=0)
    for step, plan in ((one, Collecting()), (two, Training()), (three, None)):
        step.add_argument("--out", type=Path, required=True)
        for name, value in vars(plan).items() if plan else ():
            step.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    step, out = given.pop("step"), given.pop("out")
    if step == "collect":
        collect(given.pop("start"), given.pop("domains"), out, Collecting(**given))
    elif step == "train":
        generator, losses = train(read_collected(given.pop("loras")), Training(**given))
        generator.save(out)
        print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    else:
        generate(given["generator"], given["task"], given["seed"], out)


if __name__ == "__main__":
    main()
