"""Does `quantize verify` notice every damaged byte? Flips, swaps, adds and removes, one at a time, and lists what goes unnoticed.

Works on copies of an AWQ checkpoint, a workspace and a folder of statistics that it makes of a tiny model. Every file takes its
turn, the tokenizer, config.json, run.json, report.json and the manifest included; a byte becomes any other byte.
usage: python scripts/flip_bytes.py [--flips 2000] [--changes 200] [--seed 0]
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tiny_checkpoints import quantize_source, write_source  # noqa: E402

from convert.errors import InputError  # noqa: E402
from convert.tokenizer.byte_level import CHARACTER_OF_BYTE, bpe_document  # noqa: E402
from convert.verify import verify_path  # noqa: E402

NEW_NAMES = ("modeling.py", "adapter.safetensors", "notes.md", "sub/extra.json", "tmq/more.json", ".hidden")


def make_folders(place: Path) -> list[Path]:
    """An AWQ checkpoint, a workspace and statistics of one tiny model, by the commands."""
    from turbomind_quant.cli.quantize import quantize

    source = write_source(place / "source", "llama")
    vocab = {character: byte for byte, character in CHARACTER_OF_BYTE.items()} | {"ab": 256}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        **bpe_document(vocab, [["a", "b"]]),
    }
    (source / "tokenizer.json").write_text(json.dumps(document))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    text = place / "text.txt"
    text.write_text("some words of prose that are long enough for a few samples. " * 40)
    awq, workspace, statistics = place / "awq", place / "workspace", place / "statistics"
    quantize_source(source, awq)
    sampled = ["--calib-data", str(text), "--samples", "2", "--seqlen", "32", "--device", "cpu"]
    for arguments in (
        ["pack", str(awq), "-o", str(workspace)],
        ["calibrate", str(source), "-o", str(statistics), *sampled],
    ):
        if quantize.main(arguments, standalone_mode=False):
            raise SystemExit(f"quantize {' '.join(arguments)} failed")
    return [awq, workspace, statistics]


def is_noticed(folder: Path) -> bool:
    """Whether `quantize verify --strict` fails on the folder."""
    try:
        report = verify_path(folder, strict=True)
    except InputError:
        return True
    return not report.passed


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def flipped(path: Path, at: int, change: int) -> Iterator[None]:
    """The file with one byte changed, while the context lasts."""
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(whole)


def unnoticed_flips(folders: list[Path], count: int, dice: random.Random) -> list[str]:
    """Flips that nothing notices, of `count` that go round all files."""
    found = []
    targets = [(folder, path) for folder in folders for path in files_of(folder) if path.stat().st_size]
    dice.shuffle(targets)
    for number in range(count):
        folder, path = targets[number % len(targets)]
        at, change = dice.randrange(path.stat().st_size), dice.randrange(1, 256)
        with flipped(path, at, change):
            if not is_noticed(folder):
                found.append(f"{folder.name}/{path.relative_to(folder)}, byte {at} ^ {change}")
    return found


def unnoticed_changes(folders: list[Path], count: int, dice: random.Random) -> list[str]:
    """Swaps, additions and removals that nothing notices."""
    found = []
    for number in range(count):
        folder = folders[number % len(folders)]
        what, undo = _change(folders, folder, number // len(folders) % 3, dice)
        if not is_noticed(folder):
            found.append(f"{folder.name}: {what}")
        undo()
    return found


def _change(
    folders: list[Path], folder: Path, kind: int, dice: random.Random
) -> tuple[str, Callable[[], object]]:
    if kind == 0:
        new = folder / dice.choice(NEW_NAMES).replace(".", f"{dice.randrange(1000)}.", 1)
        is_new_folder = not new.parent.exists()
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(dice.randbytes(8))
        return f"added {new.name}", lambda: shutil.rmtree(new.parent) if is_new_folder else new.unlink()
    path = dice.choice(files_of(folder))
    whole = path.read_bytes()
    if kind == 1:
        path.unlink()
        return f"removed {path.name}", lambda: path.write_bytes(whole)
    others = [other for place in folders for other in files_of(place) if other.read_bytes() != whole]
    other = dice.choice(others)
    others_bytes = other.read_bytes()
    path.write_bytes(others_bytes)
    other.write_bytes(whole)

    def undo() -> None:
        path.write_bytes(whole)
        other.write_bytes(others_bytes)

    return f"swapped {path.name} and {other.name} of {other.parent.name}", undo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folders = make_folders(Path(place))
        for folder in folders:
            if is_noticed(folder):
                raise SystemExit(f"{folder.name} does not pass as it is")
        found = unnoticed_flips(folders, options.flips, dice)
        found += unnoticed_changes(folders, options.changes, dice)
    total = options.flips + options.changes
    print(f"{total - len(found)} of {total} noticed", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
