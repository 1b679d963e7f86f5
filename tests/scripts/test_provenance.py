"""The commit that a record of figures names."""

import subprocess

from scripts import provenance


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_a_record_tells_a_checkout_from_one_with_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
    git(tmp_path, "init")
    assert provenance.commit() == "unknown"  # nothing is committed yet
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/figures.json").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = provenance.commit()
    assert len(clean) == 40
    (tmp_path / "benchmarks/figures.json").write_text("2")
    assert provenance.commit() == clean  # what is being recorded is no change
    (tmp_path / "new.py").write_text("1")
    assert provenance.commit() == clean + "-dirty"
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("2")
    assert provenance.commit() == clean + "-dirty"
