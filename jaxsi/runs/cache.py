"""Where files are kept that can be made again: the user's cache."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$XDG_CACHE_HOME if it is an absolute path, else ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".cache"
