"""The embedded benchmark: three instruction domains composed from committed pictures, words and tables.

`compose` makes one sample and `pool.pool` a cached data set; both depend on their arguments only.
"""

from workloads.data.pocket.composing import compose
from workloads.data.pocket.questions import QUESTION_TYPES, QUESTIONS, neutral_qa, vocabulary
from workloads.data.pocket.scene import DOMAINS, QA, SPLITS, Facts, Mark, Part, Scene

__all__ = [
    "DOMAINS",
    "QA",
    "QUESTIONS",
    "QUESTION_TYPES",
    "SPLITS",
    "Facts",
    "Mark",
    "Part",
    "Scene",
    "compose",
    "neutral_qa",
    "vocabulary",
]
