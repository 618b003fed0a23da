"""Where derived data is cached: `$LLAVA_CONFLICT_LAB_CACHE`, or a folder under the user's cache directory."""

import os
from pathlib import Path

ENVIRONMENT_KEY = "LLAVA_CONFLICT_LAB_CACHE"


def cache_dir() -> Path:
    """The cache folder; everything in it can be deleted and is made again."""
    named = os.environ.get(ENVIRONMENT_KEY)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base) / "llava_conflict_lab"
