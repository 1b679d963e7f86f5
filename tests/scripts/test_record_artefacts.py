"""Records of what the commands write: what is digested, and how two records are told apart."""

import json

import pytest

pytest.importorskip("tomllib")
from scripts import record_artefacts as recorder


def test_a_folder_is_digested_without_what_differs_between_equal_runs(tmp_path):
    (tmp_path / "tmq").mkdir()
    for name in ("model.safetensors", "config.json", "tmq/run.json", "tmq/report.json"):
        (tmp_path / name).write_text(name)
    manifest = {"bits": 4, "digest": "1", "files": [], "versions": {"torch": "2"}}
    (tmp_path / "tmq/manifest.json").write_text(json.dumps(manifest))
    found = recorder.digests(tmp_path, "case")
    assert {part: list(entries) for part, entries in found.items()} == {
        "files": ["case/model.safetensors"],
        "configs": ["case/config.json"],
        "manifests": ["case/tmq/manifest.json"],
        "figures": [],
    }
    (tmp_path / "tmq/manifest.json").write_text(json.dumps({**manifest, "digest": "2", "versions": {}}))
    assert recorder.digests(tmp_path, "case") == found
    (tmp_path / "tmq/manifest.json").write_text(json.dumps({**manifest, "bits": 3}))
    assert recorder.digests(tmp_path, "case") != found


def test_figures_are_one_level_without_seconds():
    document = {"rows": [{"ppl": 2.5, "seconds": 1, "peak_gib": 2, "nll": [1, 2]}]}
    assert recorder.flat(document, "case") == {
        "case/rows/0/ppl": 2.5,
        "case/rows/0/nll/0": 1,
        "case/rows/0/nll/1": 2,
    }


def test_what_differs_is_named_and_cases_that_did_not_run_are_passed_by():
    old = {
        "rows": [{"case": "a"}, {"case": "b"}],
        "files": {"a/x": "1", "a/y": "2", "b/x": "3", "inputs/t": "0"},
        "configs": {},
        "manifests": {},
        "figures": {"a/ppl": 2.0},
    }
    new = {**old, "rows": [{"case": "a"}], "files": {"a/x": "1", "a/y": "2", "inputs/t": "0"}}
    assert recorder.differences(old, new) == []
    new["files"] = {"a/x": "9", "a/z": "2", "inputs/t": "0"}
    new["figures"] = {"a/ppl": 3.0}
    assert recorder.differences(old, new) == [
        "files  a/x differs",
        "files  a/y: only in the record",
        "files  a/z: only now",
        "figures  a/ppl: 2.0 -> 3.0",
    ]
