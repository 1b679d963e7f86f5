"""The safetensors files of a model folder as one table of tensors: single file, shards with an index, or what lies there.

Says what is missing, doubled, extra, pickled, or changed since it was opened. Knows no model.
"""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.json_files import INDEX_LIMIT, read_failure, read_object, show, show_value
from convert.folder.unchanged import Unchanged
from convert.hf.safetensors_files import TensorInfo, check_finite, read_header, read_tensor

INDEX_NAME = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class TensorFolder:
    """All tensors of the top-level safetensors files of a folder. Opening reads the headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        with reading(f"the list of shards of {folder}"):
            self.paths = self._files()
        headers = {path: read_header(path) for path in self.paths}
        index = folder / INDEX_NAME
        if index.is_file() and not (len(self.paths) == 1 and self.paths[0].name == "model.safetensors"):
            self._by_index(index, headers)
        else:
            self._by_file(headers)
        self.watched = Unchanged(self.paths)

    def _files(self) -> list[Path]:
        try:
            present = sorted(path for path in self.folder.iterdir() if path.name.endswith(".safetensors"))
            names = [path.name for path in self.folder.iterdir()]
        except OSError as error:
            raise read_failure(self.folder, error) from error
        index = self.folder / INDEX_NAME
        if index.is_file() and self.folder / "model.safetensors" not in present:
            shards = _weight_map(index)
            wanted = sorted({self.folder / shard for shard in shards.values()})
            missing = [path.name for path in wanted if not path.is_file()]
            if missing:
                raise InputError(
                    f"{INDEX_NAME} lists {len(wanted)} shards, but {len(missing)} of them are absent from "
                    f"{show(str(self.folder))}: {', '.join(map(show, missing))}. Copy them there."
                )
            extra = [path.name for path in present if path not in wanted]
            if extra:
                self.notes.append(f"not in {INDEX_NAME}, ignored: {', '.join(map(show, extra))}")
            return wanted
        if present:
            single = self.folder / "model.safetensors"
            if single in present and len(present) > 1:
                extra = [path.name for path in present if path != single]
                self.notes.append(f"beside model.safetensors, ignored: {', '.join(map(show, extra))}")
                return [single]
            return present
        pickled = sorted(name for name in names if name.endswith(PICKLED))
        if pickled:
            raise InputError(
                f"{show(str(self.folder))} holds pickled weights only ({', '.join(map(show, pickled[:3]))}); reading those can "
                "run any code, so they are refused. Convert them to safetensors where you trust them (load with transformers, "
                "then `save_pretrained(folder, safe_serialization=True)`), or get the safetensors version."
            )
        raise InputError(
            f"{show(str(self.folder))} holds no *.safetensors file. Name the folder that holds the weights."
        )

    def _by_index(self, index: Path, headers: dict[Path, dict[str, TensorInfo]]) -> None:
        weight_map = _weight_map(index)
        self._refuse_duplicates(headers)
        absent = [n for n, shard in weight_map.items() if n not in headers[self.folder / shard]]
        if absent:
            first = absent[0]
            raise InputError(
                f"{INDEX_NAME} places {len(absent)} tensors in shards that do not hold them; the first is {show(first)!r} in "
                f"{show(weight_map[first])}. The index and the shards are of different checkpoints; copy both again."
            )
        for found in headers.values():
            self.tensors |= found
        unlisted = sorted(set(self.tensors) - set(weight_map))
        if unlisted:
            self.notes.append(
                f"{len(unlisted)} tensors are not in {INDEX_NAME}, the first is {show(unlisted[0])!r}"
            )

    def _by_file(self, headers: dict[Path, dict[str, TensorInfo]]) -> None:
        self._refuse_duplicates(headers)
        for found in headers.values():
            self.tensors |= found

    @staticmethod
    def _refuse_duplicates(headers: dict[Path, dict[str, TensorInfo]]) -> None:
        home: dict[str, Path] = {}
        for path, found in headers.items():
            for name in found:
                if name in home:
                    raise InputError(
                        f"tensor {show(name)!r} lies in two files, {show(home[name].name)} and {show(path.name)}. Remove the "
                        "file that does not belong to this checkpoint."
                    )
                home[name] = path

    def read(self, name: str, *, finite: bool = True) -> Tensor:
        """One tensor, finite where that is asked for. Raises InputError when its file changed since the folder was opened."""
        info = self.tensors[name]
        self.check_unchanged([info.path])
        tensor = read_tensor(info)
        if finite:
            check_finite(name, tensor)
        return tensor

    def check_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """Raises InputError naming a weight file whose size, inode or time of change differs from when it was opened."""
        self.watched.check(paths)


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_object(index, INDEX_LIMIT)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX_NAME} has no weight_map. Copy it again.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..")
        if not plain or any(c in shard for c in "/\\\0") or not shard.endswith(".safetensors"):
            raise InputError(
                f"{INDEX_NAME} places {show(name)!r} in {show_value(shard)}: expected the name of a *.safetensors file beside it."
            )
    return weight_map
