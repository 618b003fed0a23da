"""Questions and answers as token ids: the checkpoint's chat template, loss on the answer alone."""

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import LlavaProcessor

# Stands in a question where an image goes.
IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the user says and what the model answers; `<image>` stands in the question where an image goes."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of one sample; the last `num_supervised` of them are the answer and its end token."""

    ids: list[int]
    num_supervised: int


class Prompter:
    """Encodes samples for one processor; the image placeholder is expanded to the model's image tokens."""

    def __init__(self, processor: LlavaProcessor, image_tokens: int) -> None:
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.image_tokens = image_tokens
        self._prefixes: dict[str, list[int]] = {}
        text = self.tokenizer.backend_tokenizer.to_str() + str(processor.chat_template) + str(image_tokens)
        # Hash of all that decides token ids.
        self.version = hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt(self, question: str) -> str:
        """The text up to the answer, image placeholder not expanded."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def prefix(self, question: str) -> list[int]:
        """Token ids up to the answer; equal questions are encoded once."""
        if question not in self._prefixes:
            image = self.processor.image_token
            text = self.prompt(question).replace(image, image * self.image_tokens)
            self._prefixes[question] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._prefixes[question]

    def encode(self, question: str, answer: str) -> Encoded:
        """Prompt, answer and end token; the end token is supervised, or tuned models never stop."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        target = [*ids, self.tokenizer.eos_token_id]
        return Encoded(ids=[*self.prefix(question), *target], num_supervised=len(target))

    def decode(self, ids: list[int]) -> str:
        """The answer's text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
