"""Where the program keeps what it can make or fetch again: unpacked .gguf files, models of the hub, texts that models wrote.

One rule for every command and for the library.
"""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that TMQ_CACHE names; else "turbomind-quant" in XDG_CACHE_HOME, else in the user's ~/.cache."""
    if environment.get("TMQ_CACHE"):
        return Path(environment["TMQ_CACHE"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbomind-quant"
