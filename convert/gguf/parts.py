"""A GGUF model in one file or in several (`name-00001-of-00003.gguf`), opened as one: metadata of the first, tensors of all."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.json_files import show, show_value
from convert.gguf.file import open_gguf

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """`paths`: its files in order. `fields`: key -> value of the first one's metadata. `tensors`: name -> the package's tensor."""

    paths: list[Path]
    fields: dict[str, Any]
    tensors: dict[str, Any]


def part_paths(path: Path) -> list[Path]:
    """The files of the model that `path` is a part of, by its name; itself where it is whole.

    Raises InputError naming every part that is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    number = int(match["number"])
    if not 1 <= number <= count:
        raise InputError(
            f"{show(path.name)} is no part that there can be of {count}. Rename it as it was downloaded."
        )
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        listed = ", ".join(show(name) for name in missing[:5])
        raise InputError(
            f"{show(path.name)} is one of {count} parts of a split model, of which {len(missing)} are missing: {listed}"
            f"{', ...' if len(missing) > 5 else ''}. Download them into the same folder."
        )
    return [path.parent / name for name in names]


def open_parts(path: Path) -> GgufModel:
    """The whole model. Raises InputError where a part is missing, of another model, or a tensor stands in two of them."""
    with reading(path.name):
        paths = part_paths(path)
        fields: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for index, part in enumerate(paths):
            reader = open_gguf(part)
            found = {name: field.contents() for name, field in reader.fields.items()}
            _check_part(part, found, index, len(paths))
            fields = fields or found
            for tensor in reader.tensors:
                if tensor.name in tensors:
                    raise InputError(
                        f"{show(part.name)} and an earlier part both hold tensor {show(tensor.name)!r}. Download the model again."
                    )
                tensors[tensor.name] = tensor
        stated = fields.get("split.tensors.count")
        if len(paths) > 1 and stated is not None and stated != len(tensors):
            raise InputError(
                f"{show(path.name)}: its parts hold {len(tensors)} tensors, but the metadata states {show_value(stated)}. Download the "
                "model again."
            )
    return GgufModel(paths, fields, tensors)


def _check_part(part: Path, fields: dict[str, Any], index: int, count: int) -> None:
    stated, number = fields.get("split.count") or 1, fields.get("split.no") or 0
    if stated == count and number == index:
        return
    if count == 1:
        raise InputError(
            f"{show(part.name)} is part {show_value(number)} of {show_value(stated)} of a split model, but its name does not say so: "
            "give the parts the names that they were downloaded with (name-00001-of-00003.gguf), all in one folder."
        )
    raise InputError(
        f"{show(part.name)} says that it is part {show_value(number)} of {show_value(stated)}, counted from 0, but its name makes it "
        f"part {index} of {count}. Download the model again."
    )
