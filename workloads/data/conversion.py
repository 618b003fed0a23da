"""Writes a source as Parquet with its pictures inside, one file for each split of each domain; bad records are listed.

The folder also holds `data.yaml`, the section `data` that reads it.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import yaml
from pyarrow import parquet

from workloads import record
from workloads.config import DataConfig
from workloads.data import arrow, images, sources, vetting
from workloads.data.inspection import SPLITS
from workloads.data.rows import ROW, Row
from workloads.data.vetting import Verdict
from workloads.errors import UserError, reason_of, require


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written of one split of one domain."""

    domain: str
    split: str
    num_written: int
    num_rejected: int


def convert(data: DataConfig, out: Path) -> list[Converted]:
    """Write all splits of all domains into the new folder `out`, which appears when it is whole.

    Raises `UserError` when the folder exists or cannot be written.
    """
    require(not out.exists(), "--out", str(out), "a folder that does not exist yet")
    source = sources.of(data)
    done: list[Converted] = []
    domains: dict[str, dict[str, Any]] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
            folder = Path(made) / out.name
            folder.mkdir()
            for split in SPLITS:
                for domain in source.domains(split):
                    done.append(_split(folder, domain, split, vetting.plain(source.load(domain, split))))
                    section = {"format": "parquet", "scorer": source.scorer(domain)}
                    domains.setdefault(domain, section)[split] = f"{domain}/{split}.parquet"
            tree = {"source": "files", "root": str(out.resolve()), "domains": domains}
            (folder / "data.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
            folder.replace(out)
    except OSError as error:
        raise UserError(f"--out: cannot write in {out.parent}: {reason_of(error)}") from None
    return done


def _split(folder: Path, domain: str, split: str, rows: datasets.Dataset) -> Converted:
    """Write the usable rows of one split, and list the others."""
    found = vetting.vet(rows, None, 0)
    path = folder / domain / f"{split}.parquet"
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema([field for field in ROW.arrow_schema if field.name != "fault"])
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in arrow.batches(_usable(rows, found)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    bad = [(str(rows[i]["id"]), verdict.fault) for i, verdict in enumerate(found) if verdict.fault]
    with (folder / record.REJECTED).open("a", encoding="utf-8") as file:
        for name, reason in bad:
            line = {"domain": domain, "split": split, "id": name, "reason": reason}
            file.write(json.dumps(line) + "\n")
    return Converted(domain=domain, split=split, num_written=len(rows) - len(bad), num_rejected=len(bad))


def _usable(rows: datasets.Dataset, found: Sequence[Verdict]) -> Iterator[Row]:
    """The rows without a fault, their pictures as bytes."""
    for i, verdict in enumerate(found):
        if not verdict.fault:
            row = dict(rows[i])
            turns = vetting.turns_of(row)
            yield {
                "id": str(row["id"]),
                "images": [{"bytes": images.read(image), "path": None} for image in vetting.images_of(row)],
                "system": row.get("system", ""),
                "turns": [{"question": turn.question, "answer": turn.answer} for turn in turns],
                "answers": row.get("answers") or [turns[-1].answer],
                "question_type": row["question_type"],
            }
