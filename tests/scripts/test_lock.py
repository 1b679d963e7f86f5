"""Floors lie above known advisories, and the lock files hold what setup.sh installs: every version above its floor, every file by hash."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # Python 3.11
from behind import floors, locked  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCUMENT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ["report-serve", "dev-report-serve-web"]
# The first release without the hole, of packages that read what strangers send or wrote.
SAFE = {
    "jinja2": "3.1.6",  # CVE-2024-56201, CVE-2024-56326, CVE-2025-27516
    "starlette": "0.49.1",  # CVE-2024-47874, CVE-2025-54121, CVE-2025-62727
    "h11": "0.16.0",  # CVE-2025-43859
    "sentencepiece": "0.2.1",  # CVE-2026-1260
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747
    "transformers": "5.5",  # CVE-2026-4372, CVE-2026-5241
    "gradio": "6.7",  # CVE-2026-28414, CVE-2026-28416
    "python-multipart": "0.0.22",  # CVE-2024-53981, CVE-2026-24486
    "urllib3": "2.6.3",  # CVE-2025-66418, CVE-2025-66471, CVE-2026-21441
    "requests": "2.32.4",  # CVE-2024-47081
    "pillow": "12.1.1",  # CVE-2026-25990
    "filelock": "3.20.3",  # CVE-2025-68146, CVE-2026-22701
    "fonttools": "4.61.0",  # CVE-2025-66034
    "orjson": "3.11.6",  # CVE-2025-67221
    "pyarrow": "23.0.1",  # CVE-2024-52338, CVE-2026-25087
    "tqdm": "4.66.3",  # CVE-2024-34062
}


@pytest.mark.parametrize("name", SAFE)
def test_floors_are_above_known_advisories(name: str) -> None:
    assert Version(floors(DOCUMENT)[name]) >= Version(SAFE[name])


def test_every_statement_of_a_package_has_the_same_floor_or_a_safe_one() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, version in re.findall(r'"([a-z0-9-]+)>=([0-9.]+)', text):
        assert Version(version) >= Version(SAFE.get(name, "0")), f"{name}>={version}"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_all_requirements_above_their_floors(name: str) -> None:
    lock = locked((ROOT / f"requirements-{name}.lock").read_text())
    project = DOCUMENT["project"]
    wanted = [*project["dependencies"]]
    for extra in name.split("-"):
        wanted += project["optional-dependencies"][extra]
    lowest = floors({"project": {"dependencies": wanted, "optional-dependencies": {}}})
    for package, floor in lowest.items():
        if package not in ("torch", "triton"):
            assert Version(lock[package]) >= Version(floor), package
    for package, safe in SAFE.items():
        assert package not in lock or Version(lock[package]) >= Version(safe), package
    assert not {"torch", "triton"} & set(lock) and not any(p.startswith(("nvidia-", "cuda-")) for p in lock)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_hashes_and_no_address(name: str) -> None:
    text = (ROOT / f"requirements-{name}.lock").read_text()
    assert "://" not in text and not re.search(r"^-", text, re.M)
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert len(blocks) > 80 and all("--hash=sha256:" in block for block in blocks)


def test_the_scripts_install_from_a_lock_that_is_there() -> None:
    for script in ("demo.sh", "test.sh"):
        extras = re.search(r'^setup "([^"]+)"', (ROOT / "scripts" / script).read_text(), re.M)
        assert extras and extras[1].replace(",", "-") in LOCKS
    assert "--require-hashes" in (ROOT / "scripts" / "setup.sh").read_text()
