"""Benchmark of conversion: a LLaVA JSON of many records to memory-mapped Arrow; seconds, and the peak of memory.

    python -m workloads.benchmarks.conversion --records 1000000

Prints one JSON object. Records have one turn of about 80 words and a picture's path; no picture is read.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workloads.config import data_from_tree
from workloads.data import sources
from workloads.data.cache import ENVIRONMENT_KEY


def write(path: Path, num_records: int) -> None:
    """A list of records, written one by one."""
    words = " ".join(f"word{i}" for i in range(70))
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for i in range(num_records):
            said = [
                {"from": "human", "value": f"<image>\nWhat is number {i} ?"},
                {"from": "gpt", "value": f"{i} {words}"},
            ]
            record = {"id": f"r{i}", "image": f"{i % 1000:03d}/{i}.jpg", "conversations": said}
            file.write(("," if i else "") + json.dumps(record))
        file.write("]")


def convert(folder: Path) -> dict[str, Any]:
    """Convert and load the file in `folder`; the largest resident set is that of this process until now."""
    tree = {
        "source": "files",
        "root": str(folder),
        "domains": {"d": {"format": "llava_json", "train": "x.json"}},
    }
    before = resident()
    began = time.monotonic()
    rows = sources.of(data_from_tree(tree)).load("d", "train")
    seconds = time.monotonic() - began
    assert rows[len(rows) - 1]["fault"] == ""
    return {
        "records": len(rows),
        "file_mb": round((folder / "x.json").stat().st_size / 1e6, 1),
        "seconds": round(seconds, 1),
        "resident_before_mb": round(before / 1e6, 1),
        "resident_peak_mb": round(resident() / 1e6, 1),
    }


def resident() -> int:
    """Largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Write, convert, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, help="Where the files go for the time; a temporary folder by default."
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        os.environ[ENVIRONMENT_KEY] = str(Path(made) / "cache")
        write(Path(made) / "x.json", options.records)
        print(json.dumps(convert(Path(made))))


if __name__ == "__main__":
    main()
