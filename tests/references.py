"""What a LLaVA computes, one sample at a time in float64 with plain loops; uses nothing of the project's own code.

Shape letters: T tokens, V vocabulary, E experts.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sample as a pool gives it."""

    id: str
    domain: str
    images_HWC: tuple[np.ndarray, ...]
    turns: tuple["Said", ...]
    system: str = ""
    question_type: str = "name"
    task: str = ""
    features_LPD: torch.Tensor | None = None

    @property
    def question(self):
        return self.turns[-1].question.removeprefix("<image>\n")

    @property
    def answer(self):
        return self.turns[-1].answer

    @property
    def answers(self):
        return (self.answer,)


@dataclass(frozen=True, kw_only=True)
class Said:
    """One turn of an item."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Items:
    """A pool of items that are all usable."""

    items: list[Item] = field(default_factory=list)

    def sample(self, index):
        return self.items[index]


QUESTIONS = ("what is this ?", "which side is the mark on ?", "A B C D E F ?", "what ?")
ANSWERS = ("CAT", "top left", "boot", "4", "QUEUE 30 iv")


def pools(counts, seed=0):
    """Domain -> pool of random pictures with questions and answers of different lengths."""
    random = np.random.default_rng(seed)
    out, k = {}, 0
    for domain, count in counts.items():
        items = []
        for i in range(count):
            image = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            question, answer = QUESTIONS[k % len(QUESTIONS)], ANSWERS[(3 * k + i) % len(ANSWERS)]
            turn = Said(question=f"<image>\n{question}", answer=answer)
            items.append(Item(id=f"{domain}-{i}", domain=domain, images_HWC=(image,), turns=(turn,)))
            k += 1
        out[domain] = Items(items=items)
    return out


def prompt(processor, item):
    """Token ids (1, T) and pixels of a question and its picture, as the processor itself makes them."""
    content = [{"type": "image"}, {"type": "text", "text": item.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(images=list(item.images_HWC), text=[text], return_tensors="pt")
    return made["input_ids"], made["pixel_values"].double()


def target(processor, item):
    """Token ids of the answer and the end."""
    tokenizer = processor.tokenizer
    return [*tokenizer(item.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def taught(model, processor, item):
    """The losses of the answer's tokens, a list of scalars, and the whole sequence's length."""
    ids, pixels = prompt(processor, item)
    answer = target(processor, item)
    whole = torch.cat([ids, torch.tensor([answer])], dim=1)
    logits_TV = model(input_ids=whole, pixel_values=pixels).logits[0]
    assert logits_TV.dtype == torch.float64
    first = ids.shape[1]
    losses = []
    for place, token in enumerate(answer):
        row_V = logits_TV[first + place - 1]
        losses.append((row_V - row_V.max()).exp().sum().log() + row_V.max() - row_V[token])
    return losses, whole.shape[1]


def greedy(model, processor, item, max_new_tokens):
    """The likeliest next token again and again, each from a forward pass over everything so far."""
    ids, pixels = prompt(processor, item)
    new = []
    while len(new) < max_new_tokens:
        logits_V = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
        token = max(range(len(logits_V)), key=logits_V.tolist().__getitem__)
        if token == processor.tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


class Listener:
    """Keeps the scores (T, E) that each router of a model gives in a forward pass of one sample."""

    def __init__(self, model):
        self.scores = []
        for name, module in model.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(self._keep)

    def _keep(self, module, args, scores_BTE):
        self.scores.append(scores_BTE[0])

    def take(self):
        scores, self.scores = self.scores, []
        return scores


def doubled(model):
    """A copy of the model in float64, without the hooks of the original, and what listens to its routers."""
    double = copy.deepcopy(model).double().eval()
    for module in double.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return double, Listener(double)


def balance(scores_by_layer):
    """Sum over experts of mean probability times share of tokens, over all layers and tokens of one sample."""
    rows = [row_E for scores_TE in scores_by_layer for row_E in scores_TE]
    sums, chosen = 0.0, [0] * len(rows[0])
    for row_E in rows:
        powers_E = (row_E - row_E.max()).exp()
        sums = sums + powers_E / powers_E.sum()
        chosen[int(row_E.argmax())] += 1
    return sum(sums[e] / len(rows) * (count / len(rows)) for e, count in enumerate(chosen))
