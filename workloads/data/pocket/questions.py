"""All wording of the benchmark in tables: questions, each domain's answer convention, the neutral language.

The question strings are the same in every domain; what a right answer looks like differs, and only the
picture tells the domain. The base model is trained on a neutral language (codes for names, counts and places) and
then on the benchmark's questions: it knows the words for things (garments, colours, tissues, planes) and reads, but
gives counts and places in codes. How each domain words those, and whose left and right it means, is what an adapter
has to learn, as instruction tuning has to teach a model its users' conventions.
"""

from collections.abc import Iterable

from workloads.data.pocket.scene import GRID, QA, SIZE, Facts, Part, Scene

QUESTIONS = {
    "name": "what is this ?",
    "count": "how many are there ?",
    "side": "which side is the mark on ?",
    "where": "where is the mark ?",
    "at_mark": "what is at the mark ?",
    "largest": "which one is the largest ?",
    "total": "what is the total ?",
}
QUESTION_TYPES = {
    "general": ("name", "count", "side", "where", "at_mark", "largest"),
    "document": ("name", "count", "side", "where", "at_mark", "largest", "total"),
    "biomedical": ("name", "count", "side", "where", "at_mark"),
}

GARMENTS = ("tshirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
EMOJI = ("face", "hand", "heart", "flag", "clock", "arrow", "fruit", "animal", "vehicle", "building", "plant")
TINTS = ("red", "yellow", "green", "blue", "purple", "white")
GROUNDS = ("grey", "brown", "navy", "teal", "olive", "maroon", "slate", "tan")
PLANES = ("axial", "coronal", "sagittal")
TISSUES = ("grey", "white", "fluid")

COUNTS = {
    "general": ("one", "two", "three", "four", "five", "six"),
    "document": ("1", "2", "3", "4", "5", "6"),
    "biomedical": ("i", "ii", "iii", "iv", "v", "vi"),
}
# (mark on the left, mark on the right): the viewer's, or in biomedical the patient's.
SIDES = {"general": ("left", "right"), "document": ("l", "r"), "biomedical": ("left", "right")}

# Five words along each image axis, from top to bottom and from left to right.
_ROWS = ("top", "upper", "middle", "lower", "bottom")
_COLUMNS = ("leftmost", "left", "centre", "right", "rightmost")
_DIGITS = ("1", "2", "3", "4", "5")
# Anatomical terms of direction; radiological display puts the patient's right (dexter) at the image's left.
_FRONT_TO_BACK = ("anterior", "anteriad", "central", "posteriad", "posterior")
_ABOVE_TO_BELOW = ("superior", "craniad", "midway", "caudad", "inferior")
_RIGHT_TO_LEFT = ("dexter", "dextrad", "median", "sinistrad", "sinister")
PLACES = {
    "general": (_ROWS, _COLUMNS),
    "document": (_DIGITS, _DIGITS),
    "axial": (_FRONT_TO_BACK, _RIGHT_TO_LEFT),
    "coronal": (_ABOVE_TO_BELOW, _RIGHT_TO_LEFT),
    "sagittal": (_ABOVE_TO_BELOW, _FRONT_TO_BACK),
}

# The neutral language: one code per name, in the order of the tables above.
CODES = {
    **{name: f"g{index}" for index, name in enumerate(GARMENTS)},
    **{name: f"e{index}" for index, name in enumerate(EMOJI)},
    **{name: f"k{index}" for index, name in enumerate(PLANES)},
}
TINT_CODES = {name: f"c{index}" for index, name in enumerate(TINTS)}
GROUND_CODES = {name: f"b{index}" for index, name in enumerate(GROUNDS)}
TISSUE_CODES = {name: f"t{index}" for index, name in enumerate(TISSUES)}
COUNT_CODES = ("n1", "n2", "n3", "n4", "n5", "n6")
ROW_CODES = ("p1", "p2", "p3", "p4", "p5")
COLUMN_CODES = ("q1", "q2", "q3", "q4", "q5")

NEUTRAL_QUESTIONS = {
    "name": "kind",
    "count": "tally",
    "where": "locate mark",
    "at_mark": "touch",
    "largest": "top",
    "total": "sum",
}
# What the neutral language asks for; at_mark and largest are known from the benchmark's questions alone.
NEUTRAL_TYPES = ("name", "count", "where", "total")
READ_QUESTION = "read"
CAPTION_QUESTION, DETAIL_QUESTION = "describe", "list"


def answer(facts: Facts, question_type: str) -> str | None:
    """The right answer in the domain's convention, or None when the picture leaves the question open."""
    match question_type:
        case "count":
            # Beside items, lines or bars, a mark would be one more thing to count.
            unclear = facts.mark is not None and facts.domain != "biomedical"
            return None if unclear or facts.count is None else COUNTS[facts.domain][facts.count - 1]
        case "side":
            return None if facts.mark_right is None else SIDES[facts.domain][facts.mark_right]
        case "where":
            rows, columns = PLACES[facts.plane or facts.domain]
            cell = facts.mark_cell
            return None if cell is None else f"{rows[cell[0]]} {columns[cell[1]]}"
    return _thing_or_number(facts, question_type)


def _thing_or_number(facts: Facts, question_type: str) -> str | None:
    """Answers that every domain words alike: names of things, readings, sums."""
    match question_type:
        case "name":
            return facts.name
        case "at_mark":
            return facts.at_mark
        case "largest":
            return facts.largest
        case "total":
            return None if facts.total is None else str(facts.total)
    raise AssertionError(f"no wording for {question_type}")


def ask(facts: Facts) -> tuple[QA, ...]:
    """Every question of the domain that the picture answers in exactly one way, answered."""
    asked = []
    for kind in QUESTION_TYPES[facts.domain]:
        text = answer(facts, kind)
        if text is not None:
            asked.append(QA(question_type=kind, question=QUESTIONS[kind], answer=text))
    return tuple(asked)


def _neutral(facts: Facts, question_type: str) -> str | None:
    """The neutral answer: a code, or the bare reading of a document."""
    match question_type:
        case "name":
            return None if facts.name is None else CODES.get(facts.name, facts.name)
        case "count":
            return None if facts.count is None else COUNT_CODES[facts.count - 1]
        case "where":
            cell = facts.mark_cell
            return None if cell is None else f"{ROW_CODES[cell[0]]} {COLUMN_CODES[cell[1]]}"
        case "total":
            return None if facts.total is None else str(facts.total)
    raise AssertionError(f"no neutral wording for {question_type}")


def neutral_qa(scene: Scene) -> tuple[QA, ...]:
    """Short questions in the neutral language: `kind`, `read`, `tally`, `locate mark`, `sum`."""
    asked = []
    for kind in NEUTRAL_TYPES:
        text = _neutral(scene.facts, kind)
        reads = kind == "name" and scene.facts.domain == "document"
        if text is not None:
            question = READ_QUESTION if reads else NEUTRAL_QUESTIONS[kind]
            asked.append(QA(question_type=kind, question=question, answer=text))
    return tuple(asked)


def known_qa(scene: Scene) -> tuple[QA, ...]:
    """The benchmark's questions as the base answers them: things in words, counts and places in codes.

    The side question is not among them: left and right stay a skill that an adapter has to learn.
    """
    asked = []
    for kind, question in QUESTIONS.items():
        if kind == "side":
            continue
        coded = kind in ("count", "where")
        text = _neutral(scene.facts, kind) if coded else _thing_or_number(scene.facts, kind)
        if text is not None:
            asked.append(QA(question_type=kind, question=question, answer=text))
    return tuple(asked)


def caption(facts: Facts) -> str:
    """A short neutral sentence: what it shows, how many, the mark's place; e.g. `photo g4 c0 on b2 p2 q4`."""
    words: list[str | None] = []
    match facts.domain:
        case "general":
            words = ["photo", _neutral(facts, "name"), _neutral(facts, "count")]
            if facts.layout == "single":
                words.append(TINT_CODES.get(facts.parts[0].colour))
            words += ["on", GROUND_CODES[facts.ground]]
        case "document":
            words = [facts.layout, _neutral(facts, "name"), _neutral(facts, "count")]
            words += ["total", _neutral(facts, "total")] if facts.total is not None else []
        case "biomedical":
            words = ["scan", _neutral(facts, "name"), _neutral(facts, "count")]
    words.append(_neutral(facts, "where"))
    return " ".join(word for word in words if word)


def detail(facts: Facts) -> str:
    """Everything the picture shows, part by part in reading order; e.g. `g4 c0 p2 q3 e1 p4 q1`, `C p2 q1 A p2 q2`.

    Much to say about one picture teaches the base model to see sooner than a short caption does; that every
    letter comes with its place teaches it where to look for the next one.
    """
    down = sorted(facts.parts, key=lambda part: (part.box[1], part.box[0]))
    match facts.layout:
        case "word":
            words = [word for part in down for word in _letters(part)]
        case "receipt":
            words = [word for part in down for word in (part.label.upper(), f"{part.value:.0f}")]
            words += ["=", str(facts.total)]
        case "chart":
            tallest = max(part.value for part in down)
            across = sorted(down, key=lambda part: part.box[0])
            heights = [COUNT_CODES[min(5, int(6 * part.value / tallest))] for part in across]
            words = [w for part, height in zip(across, heights, strict=True) for w in (part.label, height)]
        case _:
            words = [word for part in down for word in _thing(part)]
    return " ".join(words)


def _thing(part: Part) -> list[str]:
    """A garment, emoji or dot: what it is, its tint, its place; e.g. `g4 c0 p2 q3`."""
    named = [CODES[part.label]] if part.label in CODES else []
    return named + ([TINT_CODES[part.colour]] if part.colour else []) + _place_codes(part.box)


def _letters(part: Part) -> list[str]:
    """Every letter of a word with its place; letters share the word's box evenly."""
    left, top, right, bottom = part.box
    pitch = (right - left) // len(part.label)
    boxes = [(left + i * pitch, top, left + (i + 1) * pitch, bottom) for i in range(len(part.label))]
    return [w for letter, box in zip(part.label, boxes, strict=True) for w in (letter, *_place_codes(box))]


def _place_codes(box: tuple[int, int, int, int]) -> list[str]:
    """Row and column of a box's centre in the 5 x 5 grid."""
    row, column = (box[1] + box[3]) * GRID // (2 * SIZE), (box[0] + box[2]) * GRID // (2 * SIZE)
    return [ROW_CODES[min(row, GRID - 1)], COLUMN_CODES[min(column, GRID - 1)]]


def _words_of(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in text.split()}


def vocabulary() -> list[str]:
    """All lower-case words and signs of questions, answers, captions and neutral QA, sorted.

    Not in it: transcriptions and labels (capitals A-Z, spelled) and numbers (digits 0-9).
    """
    tables = [GARMENTS, EMOJI, TINTS, PLANES, TISSUES, COUNTS["general"], COUNTS["biomedical"]]
    tables += [names for pair in PLACES.values() for names in pair] + list(SIDES.values())
    tables += [tuple(codes.values()) for codes in (CODES, TINT_CODES, GROUND_CODES, TISSUE_CODES)]
    tables += [
        COUNT_CODES,
        ROW_CODES,
        COLUMN_CODES,
        tuple(NEUTRAL_QUESTIONS.values()),
        (READ_QUESTION, CAPTION_QUESTION, DETAIL_QUESTION),
    ]
    tables += [tuple(QUESTIONS.values()), ("photo on", "word receipt chart total", "scan")]
    return sorted(
        word for word in _words_of(text for table in tables for text in table) if not word.isdigit()
    )
