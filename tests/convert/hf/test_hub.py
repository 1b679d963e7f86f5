"""Hub names: fetched only when named, never as code, and a failure says what to do. No network is used."""

from pathlib import Path

import huggingface_hub
import pytest
from tiny_models import write_model

from convert.errors import InputError
from convert.hf.hub import is_hub_name
from convert.readers import open_checkpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model", True),
        ("a.b/c-d_e", True),
        ("model", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("../x", False),
        ("a/", False),
    ],
)
def test_what_a_hub_name_is(name: str, expected: bool) -> None:
    assert is_hub_name(name) is expected


def test_a_named_model_is_fetched(tmp_path: Path, monkeypatch, request) -> None:
    write_model(tmp_path / "snapshot")
    asked = []

    def snapshot(name, allow_patterns, cache_dir):
        asked.append((name, cache_dir))
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/model", cache_dir=tmp_path / "c").config.family == "llama"
    assert asked == [("owner/model", tmp_path / "c" / "hub")]
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint("no-hub-name")
    assert len(asked) == 1


def test_no_network_is_explained(tmp_path: Path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="network"):
        open_checkpoint("owner/model")
