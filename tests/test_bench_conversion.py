"""Conversion streams: ten times the records take hardly more memory."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of what is kept of every record: an eight-byte hash of its id.
MB_FOR_20_000_RECORDS = 25


def peak(records, folder):
    words = [
        sys.executable,
        "-m",
        "workloads.benchmarks.conversion",
        "--records",
        str(records),
        "--folder",
        str(folder),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["records"] == records
    return found["resident_peak_mb"]


def test_memory_does_not_follow_the_number_of_records(tmp_path):
    assert peak(22_000, tmp_path) - peak(2_000, tmp_path) < MB_FOR_20_000_RECORDS
