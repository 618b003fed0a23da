"""VQA accuracy: how many of ten people gave this answer, after the normalisation of the official evaluation.

Source:  Antol et al. 2015, VQA, arXiv:1505.00468; rules and tables of its evaluation, visualqa.org/evaluation.
Differs: Answers are normalised also where all ten people agree, as LLaVA's TextVQA evaluation does, and an
         empty answer is wrong. A single reference is compared directly. With two or three references the
         formula cannot reach 1.
"""

import re
from collections.abc import Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Every contraction is known by its spellings with one apostrophe left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
_FULL = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry of the official table that takes an apostrophe away


def normalise(text: str) -> str:
    """Punctuation marks, articles and capitals removed, number words as digits, contractions with apostrophes."""
    text = " ".join(text.split())
    glued = _COMMA_IN_NUMBER.search(text) is not None
    bare = text
    for mark in _MARKS:
        beside_blank = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if glued or beside_blank else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", bare).lower().split()]
    return " ".join(_FULL.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(raw: str, answers: Sequence[str]) -> float:
    """Mean over the people left out of min(1, others who gave this answer / 3)."""
    if not raw.strip():
        return 0.0
    given = normalise(raw)
    count = sum(normalise(answer) == given for answer in answers)
    if len(answers) == 1:
        return float(count)
    # Leaving out one who agrees, leaving out one who does not.
    agreed = count * min(1.0, (count - 1) / 3)
    return (agreed + (len(answers) - count) * min(1.0, count / 3)) / len(answers)
