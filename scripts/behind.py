"""What is behind: packages of the lock of which the index has a newer release, and floors of pyproject.toml far below the lock.

    python scripts/behind.py [--json]      in the environment that scripts/setup.sh made; asks the package index

Run it before a release, look up what the newer ones mend, raise the floors where that is a hole, and `bash scripts/lock.sh --upgrade`.
With pip-audit installed it also asks for known advisories of what is installed. Exit code 1 where something is behind.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-dev-report-serve-web.lock"


def locked(text: str) -> dict[str, str]:
    """Name -> version of a lock file, for this interpreter where it has several."""
    out: dict[str, str] = {}
    for name, version, rest in re.findall(r"^([a-z0-9._-]+)==(\S+)(.*)$", text, re.M):
        below = "python_full_version < '3.11'" in rest
        if not below or sys.version_info < (3, 11):
            out[name] = version
    return out


def floors(document: dict[str, Any]) -> dict[str, str]:
    """Name -> lowest version that pyproject.toml admits."""
    project = document["project"]
    wanted = [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]
    found = (re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9][0-9.]*)", text) for text in wanted)
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}


def outdated() -> dict[str, str]:
    """Name -> newest release of what is installed and older."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "list",
        "--outdated",
        "--format",
        "json",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {p["name"].lower().replace("_", "-"): p["latest_version"] for p in json.loads(done.stdout)}


def advisories() -> list[str]:
    """What pip-audit says of this environment; nothing where it is not installed."""
    if importlib.util.find_spec("pip_audit") is None:
        return []
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--format", "json"], capture_output=True, text=True
    )
    packages = json.loads(done.stdout or "{}").get("dependencies", [])
    return [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    lock, newest = locked(LOCK.read_text()), outdated()
    lowest = floors(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    rows = [
        {"name": name, "locked": version, "floor": lowest.get(name), "newest": newest[name]}
        for name, version in sorted(lock.items())
        if name in newest and newest[name] != version
    ]
    known = advisories()
    if as_json:
        print(json.dumps({"behind": rows, "advisories": known}, indent=1))
    else:
        for row in rows:
            print(
                f"{row['name']}: locked {row['locked']}, floor {row['floor'] or 'none'}, newest {row['newest']}"
            )
        print("\n".join(known))
        print(
            f"{len(rows)} of {len(lock)} locked packages are behind; {len(known)} advisories known to pip-audit"
        )
    return int(bool(rows or known))


if __name__ == "__main__":
    sys.exit(main())
