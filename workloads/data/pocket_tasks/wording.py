"""How the tasks are asked: paraphrases in three types, the same ones for all tasks that ask the same.

Source:  CoIN trains with one type of instruction and evaluates with others (Chen et al. 2024, arXiv:2403.08350).
Differs: all words are ones the base has as whole tokens, and no wording names a task or the form of its answer.
"""

# What is asked -> type of wording -> its paraphrases; `plain` is how `pocket` asks.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "identity": {
        "plain": ("what is this ?",),
        "reworded": ("which one is this ?", "what kind is this ?", "this is what ?"),
        "terse": ("this ?", "kind ?"),
    },
    "count": {
        "plain": ("how many are there ?",),
        "reworded": ("there are how many ?", "what is the tally ?", "how many is this ?"),
        "terse": ("how many ?", "tally ?"),
    },
    "largest": {
        "plain": ("which one is the largest ?",),
        "reworded": ("what is the largest one ?", "the largest one is which ?", "which is the top one ?"),
        "terse": ("largest ?", "which one ?"),
    },
    "total": {
        "plain": ("what is the total ?",),
        "reworded": ("what is the sum ?", "the total is what ?", "how many is the total ?"),
        "terse": ("total ?", "sum ?"),
    },
    "mark": {
        "plain": ("what is at the mark ?",),
        "reworded": ("what is the mark on ?", "the mark is on what ?", "which kind is at the mark ?"),
        "terse": ("at the mark ?", "mark ?"),
    },
}
TYPES = ("plain", "reworded", "terse")
