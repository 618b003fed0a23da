"""`prepare`: puts together a base model that is too large to be packaged."""

from typing import Annotated

import typer

from orchestrator.terminal import console, say

NAMES = ("smol",)


def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smol: SmolLM2-135M with a ViT-S/14 tower.")],
    lm: Annotated[str, typer.Option("--lm", help="A folder of a Llama with a chat template.")] = "",
    tower: Annotated[str, typer.Option("--tower", help="A folder of a DINOv2.")] = "",
    layers: Annotated[
        int, typer.Option("--layers", help="Blocks of the language model: 8 (smol) or 30 (smol-30).")
    ] = 8,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the projector's training.")] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Matrix products in bfloat16, for processors that have them.")
    ] = False,
    hub: Annotated[bool, typer.Option("--hub", help="Fetch what is not given from the hub.")] = False,
) -> None:
    """Build a pretrained base in the cache and train its projector."""
    from workloads.errors import require

    require(name in NAMES, "NAME", name, f"one of {', '.join(NAMES)}", NAMES)
    require(steps >= 0, "--steps", steps, "a whole number of 1 or more, or 0 for the recipe's own")
    from workloads.training import smol

    out = console()
    recipe = smol.Recipe(num_steps=steps or smol.Recipe.num_steps, bf16=bf16)
    given = {option: place for option, place in (("--lm", lm), ("--tower", tower)) if place}
    words = [f"{option} {place}" for option, place in given.items()]
    words += [f"--layers {layers}", f"--steps {recipe.num_steps}"] + ["--bf16"] * bf16 + ["--hub"] * hub
    command = f"orchestrator prepare {name} {' '.join(words)}"
    folder = smol.prepare(given, layers, recipe, hub, command, lambda text: say(out, text))
    say(out, str(folder))
