"""The documentation site: it builds without a warning, has every public name, and links lead somewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

import turbomind_quant

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return place


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "API" / "index.html").read_text(encoding="utf8")
    missing = [name for name in turbomind_quant.__all__ if f".{name}" not in page]
    assert not missing


def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        place = site if path.stem == "index" else site / path.stem
        assert (place / "index.html").is_file(), path.name
