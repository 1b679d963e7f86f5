"""Models of the Hugging Face hub, fetched only when the user names one: weights as safetensors, texts, never code to run."""

import re
from pathlib import Path

from convert.errors import InputError
from convert.folder.cache import cache_folder
from convert.folder.json_files import show

WANTED = ["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]


def is_hub_name(name: str) -> bool:
    """Whether the text can be "owner/model"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None


def fetch_from_hub(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of a downloaded snapshot, kept under `cache_dir` (None: the cache folder). Raises InputError when it cannot be had; nothing in it is executed."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, allow_patterns=WANTED, cache_dir=(cache_dir or cache_folder()) / "hub"
        )
    except Exception as error:  # the library raises many types, among them those of its HTTP client
        raise InputError(
            f"{show(name)} is no folder here, and fetching it from the hub failed ({type(error).__name__}: "
            f"{show(str(error).splitlines()[0] if str(error) else '', 160)}). Check the name and the network, or copy the model "
            "folder here and name its path."
        ) from error
    return Path(folder)
