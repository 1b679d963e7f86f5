"""Finds the reader of a model on disk: a Hugging Face folder, a GGUF file, a TurboMind workspace, or a name on the hub."""

from os import PathLike
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.errors import InputError
from convert.folder.json_files import show
from convert.folder.state import refuse_unfinished
from convert.gguf.reader import gguf_file_in, unpack_gguf
from convert.hf.hub import fetch_from_hub, is_hub_name
from convert.hf.reader import open_hf
from convert.turbomind.reader import open_workspace


def open_checkpoint(
    path: str | PathLike[str], *, family: str | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """Open a model: Hugging Face folder, .gguf file or its folder, TurboMind workspace, or a hub name ("owner/model").

    Args:
        family: a family's name, which decides instead of config.json.
        cache_dir: where a .gguf is unpacked and a hub model is fetched to; None: the cache folder.

    Raises InputError when it is none of these or damaged.
    """
    place = Path(path)
    try:
        is_dir, is_file = place.is_dir(), place.is_file()
    except OSError as error:
        raise InputError(f"{show(str(path))} is no usable path: {error.strerror}.") from error
    except ValueError as error:  # a NUL inside
        raise InputError(f"{show(str(path))} is no usable path: {error}.") from error
    if is_file:
        if place.suffix.lower() != ".gguf":
            raise InputError(
                f"{show(str(place))} is a file: expected a folder with config.json and *.safetensors, or a .gguf file."
            )
        place = unpack_gguf(place, cache_dir)
    elif not is_dir:
        if not is_hub_name(str(path)):
            raise InputError(
                f"{show(str(path))} does not exist: expected a model folder, a .gguf file or a hub name."
            )
        place = fetch_from_hub(str(path), cache_dir)
    elif (place / "triton_models").is_dir():
        return open_workspace(place)
    elif (file := gguf_file_in(place)) is not None:
        refuse_unfinished(place)
        place = unpack_gguf(file, cache_dir)
    return open_hf(place, family)
