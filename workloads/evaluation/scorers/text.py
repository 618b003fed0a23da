"""Exact match: a raw answer and the gold answer to a score in [0, 1]; the usual answer to each question."""


def normalise(text: str) -> str:
    """Outer and repeated blanks removed; case is kept, since capitals mark transcriptions."""
    return " ".join(text.split())


def exact(raw: str, gold: str) -> float:
    """1 when the normalised answers are equal and not empty, else 0."""
    given = normalise(raw)
    return float(bool(given) and given == normalise(gold))


def majority(questions: list[str], answers: list[str]) -> dict[str, str]:
    """The most frequent answer to each question; the first in order of the alphabet among equals."""
    counts: dict[str, dict[str, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        of_question = counts.setdefault(question, {})
        of_question[answer] = of_question.get(answer, 0) + 1
    return {q: min(c, key=lambda a: (-c[a], a)) for q, c in counts.items()}
