"""One sample of the benchmark: choose a question, draw a picture that answers it, word all it settles."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from workloads.data.pocket import biomedical, document, general
from workloads.data.pocket.questions import QUESTION_TYPES, ask, caption
from workloads.data.pocket.scene import DOMAINS, SPLITS, Facts, Scene, generator
from workloads.errors import require

_DRAW: dict[str, Callable[[np.random.Generator, str, str], tuple[np.ndarray, Facts, tuple[str, ...]]]] = {
    "general": general.draw,
    "document": document.draw,
    "biomedical": biomedical.draw,
}


@lru_cache(maxsize=256)
def _turns(domain: int, split: int, seed: int, block: int) -> tuple[int, ...]:
    """The order of question types in one block of samples: each type once."""
    count = len(QUESTION_TYPES[DOMAINS[domain]])
    return tuple(generator(domain, split, seed, block, 1).permutation(count).tolist())


def compose(domain: str, split: str, seed: int, index: int) -> Scene:
    """Sample `index` of a domain's endless stream; a pure function of its arguments.

    A domain with n question types has each type once as the focus of every aligned block of n samples.
    Raises UserError for an unknown domain or split, or a negative seed or index.
    """
    require(domain in DOMAINS, "domain", domain, f"choose one of {', '.join(DOMAINS)}", DOMAINS)
    require(split in SPLITS, "split", split, f"choose one of {', '.join(SPLITS)}", SPLITS)
    require(seed >= 0 and index >= 0, "seed, index", (seed, index), "both are at least 0")
    key = (DOMAINS.index(domain), SPLITS.index(split), seed)
    types = QUESTION_TYPES[domain]
    block, turn = divmod(index, len(types))
    focus = types[_turns(*key, block)[turn]]
    image, facts, sources = _DRAW[domain](generator(*key, index, 0), split, focus)
    qa = ask(facts)
    assert any(pair.question_type == focus for pair in qa), (domain, split, seed, index, focus)
    return Scene(image=image, facts=facts, caption=caption(facts), qa=qa, sources=sources, focus=focus)
