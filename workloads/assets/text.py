"""Words and small tables of the document domain, cut out of their packages.

Differs: words keep three to five letters a-z without the listed offensive ones; tables keep label and value,
the value being a count, a mean or a sum of the published rows.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from workloads.assets.packages import from_deb, from_wheel

SPLITS = ("train", "val", "test")

OFFENSIVE = """
anal anus arse ass balls bimbo bitch boob boobs bra breast bum butt chink cock coon crap cum cunt
damn darky dead death dick die dike dildo drug drugs dyke fag fags fairy fanny fart fat fuck gay
gays gook hell homo honky horny hymen idiot jew jews kike kill kills lust moron murder nazi nazis
negro nigga nigger nude nudes orgy pansy penis piss poof poop porn prick prude pubic puke pussy
queer rape raped rapes rapist rump satan screw semen sex sexed sexes sexy shit slave slay slit
slut sluts snot spic spunk squaw suck sucks teat tit tits titty tramp turd twat urine vomit vulva
wanna wench whore wino wop
"""

# Split of each published data set; all tables cut from one data set share it.
TABLE_SPLITS = {
    "wheat": "train", "iowa-electricity": "train", "barley": "train", "airports": "train",
    "crimea": "val",
    "us-employment": "test", "seattle-weather": "test",
}  # fmt: skip

Rows = list[tuple[str, float]]


def deal(count: int) -> np.ndarray:
    """The split (0 train, 1 val, 2 test) of each of `count` sources in order: 6 : 2 : 2."""
    pattern_P = np.array([0, 0, 2, 0, 1, 0, 0, 2, 0, 1], np.uint8)
    return pattern_P[np.arange(count) % len(pattern_P)]


def build_words(package: Path) -> dict[str, list[str]]:
    """Split -> words, each word in one split only."""
    text = from_deb(package, "usr/share/dict/american-english-small").decode()
    words = sorted(set(re.findall(r"^[a-z]{3,5}$", text, re.MULTILINE)) - set(OFFENSIVE.split()))
    # Dealt within each length, and by reversed spelling, so that neighbours differ in more than their ending.
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    for length in (3, 4, 5):
        same = sorted((word for word in words if len(word) == length), key=lambda word: word[::-1])
        for word, split in zip(same, deal(len(same)), strict=True):
            dealt[SPLITS[split]].append(word)
    return {split: sorted(group) for split, group in dealt.items()}


def _grouped(pairs: Iterable[tuple[str, float]], how: str) -> Rows:
    groups: dict[str, list[float]] = defaultdict(list)
    for label, value in pairs:
        groups[label].append(value)
    mean = how == "mean"
    return [(label, sum(values) / (len(values) if mean else 1)) for label, values in sorted(groups.items())]


def _numbered(rows: list[dict], label: str, value: str) -> Rows:
    return [(str(row[label]), float(row[value])) for row in rows if value in row]


def _training_tables(sets: dict[str, list[dict]]) -> dict[str, Rows]:
    tables = {f"wheat-{series}": _numbered(sets["wheat"], "year", series) for series in ("wheat", "wages")}
    for source in ("Fossil Fuels", "Nuclear Energy", "Renewables"):
        rows = [row for row in sets["iowa-electricity"] if row["source"] == source]
        tables[f"iowa-electricity-{source.split()[0].lower()}"] = _numbered(rows, "year", "net_generation")
    for site in sorted({row["site"] for row in sets["barley"]}):
        for year in (1931, 1932):
            rows = [row for row in sets["barley"] if row["site"] == site and row["year"] == year]
            tables[f"barley-{site.lower().replace(' ', '-')}-{year}"] = _numbered(rows, "variety", "yield")
    tables["airports-state"] = _grouped(((row["state"], 1.0) for row in sets["airports"]), "sum")
    return tables


def _held_out_tables(sets: dict[str, list[dict]]) -> dict[str, Rows]:
    causes = ("disease", "wounds", "other")
    tables = {f"crimea-{cause}": _numbered(sets["crimea"], "date", cause) for cause in causes}
    totals = {"month", "nonfarm", "private", "nonfarm_change"}
    for row in sets["us-employment"]:
        if row["month"].endswith("-01-01"):
            pairs = [(sector, float(jobs)) for sector, jobs in row.items() if sector not in totals]
            tables[f"us-employment-{row['month'][:4]}"] = pairs
    for column, how in {"precipitation": "sum", "wind": "mean", "temp_max": "mean"}.items():
        pairs = ((row["date"][:7], float(row[column])) for row in sets["seattle-weather"])
        tables[f"seattle-weather-{column.replace('_', '-')}"] = _grouped(pairs, how)
    return tables


def build_tables(package: Path) -> dict[str, dict]:
    """Table name -> {split, rows: [[label, value], ...]}; values are positive."""
    sets = {}
    for name in TABLE_SPLITS:
        suffix = "json" if name in ("wheat", "barley", "crimea") else "csv"
        raw = from_wheel(package, f"vega_datasets/_data/{name}.{suffix}").decode()
        sets[name] = json.loads(raw) if suffix == "json" else list(csv.DictReader(io.StringIO(raw)))
    built = {}
    for name, rows in (_training_tables(sets) | _held_out_tables(sets)).items():
        owner = next(owner for owner in TABLE_SPLITS if name.startswith(f"{owner}-"))
        kept = [[label.lower(), round(value, 4)] for label, value in rows if value > 0]
        built[name] = {"split": TABLE_SPLITS[owner], "rows": kept}
    return built
