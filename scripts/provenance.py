"""What every record of figures begins with: the command, the commit, the day, the device and the versions."""

import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance(device: str, command: str | None = None, **versions: str) -> dict[str, Any]:
    """The head of a document of figures.

    command: what a reader types to measure again; None: the command that runs. versions: of packages beside Python and torch.
    """
    import torch  # for its version alone, whose suffix names the build: the metadata of some wheels leaves it out

    return {
        "command": command_line() if command is None else command,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
    }


def command_line() -> str:
    """The command that runs, without the folders of this machine."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return " ".join(["python", "scripts/" + Path(sys.argv[0]).name, *words])


def commit() -> str:
    """Hash of the checkout, with "-dirty" where its files differ from it (figures in benchmarks/ apart); "unknown" where it is none or git
    is not here."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown"
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks")
    return head + "-dirty" * bool(changed) if head else "unknown"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
