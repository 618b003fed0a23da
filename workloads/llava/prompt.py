"""Conversations as token ids: the checkpoint's chat template, images expanded, loss on the answers alone.

An end token is supervised behind every answer, or tuned models never stop: the template's own, and where the
template has none there (as LLaVA-1.5's), the tokenizer's.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from workloads.data.rows import IMAGE
from workloads.errors import UserError
from workloads.llava.kinds import Processor, Size, Tiles

# Stands for answer k while a template is rendered; private-use characters are in no text and are never trimmed.
_ANSWER = "\ue000{}\ue001"
# Rendered conversations kept in memory; all are forgotten beyond.
_MAX_CACHED = 4096


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the user says and what the model answers; `<image>` stands in the question where an image goes."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of one conversation, and which of them are answers and their end tokens."""

    ids: list[int]
    supervised: list[bool]
    # Tokens before the last answer.
    prompt_length: int


class Prompter:
    """Encodes conversations for one processor; an image placeholder is expanded to the model's image tokens."""

    def __init__(
        self, processor: Processor, image_tokens: int, ends: Sequence[int] = (), tiles: Tiles | None = None
    ) -> None:
        """`ends` are the ids that end the model's answers beside the tokenizer's end token.

        `image_tokens` are those of an image, or with `tiles`, of a square one. Raises UserError when the chat
        template asks for an answer in another way than it renders answers.
        """
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.image_tokens = image_tokens
        # Where an image's tokens depend on its size: `encode` and `prefix` need the sizes then.
        self.tiles = tiles
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.ends = tuple(dict.fromkeys([self.tokenizer.eos_token_id, *ends]))
        self._rendered: dict[tuple[Any, ...], list[str]] = {}
        text = self.tokenizer.backend_tokenizer.to_str() + str(processor.chat_template) + str(image_tokens)
        text += "".join(f" {end}" for end in self.ends[1:])
        text += tiles.described() if tiles else ""
        # Hash of all that decides token ids.
        self.version = hashlib.sha256(text.encode()).hexdigest()[:16]
        # A tokenizer that begins every text with its first token does so in a conversation.
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        self._begin: list[int] = [self.tokenizer.bos_token_id] if begins else []
        # Space that the template has before an answer and leaves to the model when it asks for one.
        self._gap = 0
        self._check()

    def prompt(self, turns: Sequence[Turn], system: str = "") -> str:
        """The text up to the last answer, image placeholders not expanded."""
        pieces = self._pieces(turns, system, asks=True)
        return pieces[0] + "".join(t.answer.strip() + p for t, p in zip(turns[:-1], pieces[1:], strict=True))

    def prefix(self, turns: Sequence[Turn], system: str = "", sizes: Sequence[Size] = ()) -> list[int]:
        """Token ids up to the last answer; `sizes` as in `encode`."""
        return self._encode(turns[:-1], self._pieces(turns, system, asks=True), sizes).ids

    def encode(self, turns: Sequence[Turn], system: str = "", sizes: Sequence[Size] = ()) -> Encoded:
        """The whole conversation to its last end token; space around an answer is dropped.

        `sizes` are those of the images in order; without tiles they are not needed. Raises ValueError when an image's
        placeholder stands elsewhere than in a question, or when the chat template refuses the conversation.
        """
        encoded = self._encode(turns, self._pieces(turns, system, asks=False), sizes)
        last = len(encoded.supervised) - encoded.supervised[::-1].index(True)
        return Encoded(
            ids=encoded.ids[:last],
            supervised=encoded.supervised[:last],
            prompt_length=encoded.prompt_length,
        )

    def decode(self, ids: list[int]) -> str:
        """The answer's text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _encode(self, turns: Sequence[Turn], pieces: list[str], sizes: Sequence[Size]) -> Encoded:
        """Ids of `pieces` with the answers between them; one piece more than turns."""
        each = self._each(pieces, sizes)
        text, spans = pieces[0], []
        for turn, piece in zip(turns, pieces[1:], strict=True):
            answer = turn.answer.strip()
            if self.processor.image_token in answer:
                raise ValueError(f"answer: holds {self.processor.image_token}")
            spans.append((len(text) - self._gap, len(text) + len(answer)))
            text += answer + piece
        made = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        tokens: list[int] = made["input_ids"]
        starts, stops = ([place[side] for place in made["offset_mapping"]] for side in (0, 1))
        begin = [] if text.startswith(self.tokenizer.bos_token or "\ue000") else self._begin
        ids, supervised = list(begin), [False] * len(begin)
        done, before_last = 0, 0
        for first_character, end_character in spans:
            first = bisect_right(stops, first_character)
            closing = end = max(first, bisect_left(starts, end_character))
            while closing < len(tokens) and not text[starts[closing] : stops[closing]].strip():
                closing += 1
            closed = closing < len(tokens) and tokens[closing] in self.ends
            self._add(tokens[done:first], each, ids, supervised)
            before_last = len(ids)
            answered = tokens[first : closing + 1] if closed else [*tokens[first:end], self.ends[0]]
            ids += answered
            supervised += [True] * len(answered)
            done = closing + 1 if closed else end
        self._add(tokens[done:], each, ids, supervised)
        return Encoded(ids=ids, supervised=supervised, prompt_length=before_last)

    def _each(self, pieces: list[str], sizes: Sequence[Size]) -> Iterator[int]:
        """Tokens of each image in turn."""
        count = sum(piece.count(self.processor.image_token) for piece in pieces)
        if self.tiles is None:
            return iter([self.image_tokens] * count)
        assert len(sizes) == count, f"{len(sizes)} sizes for {count} images"
        return iter([self.tiles.tokens(size) for size in sizes])

    def _add(
        self, tokens: Sequence[int], each: Iterator[int], ids: list[int], supervised: list[bool]
    ) -> None:
        """Append tokens that no loss is taken on, images expanded to their tokens, the next of `each`."""
        for token in tokens:
            ids += [token] * (next(each) if token == self.image_id else 1)
        supervised += [False] * (len(ids) - len(supervised))

    def _pieces(self, turns: Sequence[Turn], system: str, asks: bool) -> list[str]:
        """The rendered text around the answers; `asks` ends it where the last answer goes."""
        key = (system, *(turn.question for turn in turns), asks)
        if key not in self._rendered:
            if len(self._rendered) >= _MAX_CACHED:
                self._rendered.clear()
            self._rendered[key] = self._render(turns, system, asks)
        return self._rendered[key]

    def _render(self, turns: Sequence[Turn], system: str, asks: bool) -> list[str]:
        messages = [_message("system", system)] if system else []
        marks = [_ANSWER.format(k) for k in range(len(turns))]
        for turn, mark in zip(turns, marks, strict=True):
            messages += [_message("user", turn.question), _message("assistant", mark)]
        if asks:
            messages.pop()
            marks.pop()
        try:
            rest = str(self.processor.apply_chat_template(messages, add_generation_prompt=asks))
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from None
        pieces: list[str] = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("chat template: leaves out an answer")
            pieces.append(piece)
        pieces.append(rest)
        image, wanted = self.processor.image_token, sum(turn.question.count(IMAGE) for turn in turns)
        if (given := sum(piece.count(image) for piece in pieces)) != wanted:
            raise ValueError(f"{image}: {given} in the rendered conversation, {wanted} in its questions")
        return pieces

    def _check(self) -> None:
        turns = [Turn(question=f"{IMAGE}\nwhat ?", answer="this"), Turn(question="where ?", answer="here")]
        try:
            asked, whole = self._pieces(turns, "", asks=True)[-1], self._pieces(turns, "", asks=False)[-2]
            self._gap = len(whole) - len(asked)
            sizes = [(self.tiles.side, self.tiles.side)] if self.tiles else []
            encoded, prefix = self.encode(turns, sizes=sizes), self.prefix(turns, sizes=sizes)
        except ValueError as error:
            raise UserError(f"model.name_or_path: its chat template does not serve: {error}") from None
        fits = whole.startswith(asked) and not whole[len(asked) :].strip()
        if not fits or encoded.ids[: encoded.prompt_length] != prefix:
            raise UserError(
                f"model.name_or_path: its chat template asks for an answer by {asked[-20:]!r} and renders it otherwise"
            )


def _message(role: str, text: str) -> dict[str, Any]:
    """One message in the form of chat templates: text and images in their order."""
    parts: list[dict[str, str]] = []
    for k, part in enumerate(text.split(IMAGE) if role == "user" else [text]):
        parts += [{"type": "image"}] if k else []
        parts += [{"type": "text", "text": part.strip()}] if part.strip() else []
    return {"role": role, "content": parts}
