"""Where the cache is, and that every way to a model asks the same rule."""

from pathlib import Path

import pytest
from tiny_gguf import write_gguf

from convert.folder.cache import cache_folder
from convert.readers import open_checkpoint
from engine.config import EngineConfig
from engine.loading import open_source
from engine.source import ModelSource


def test_the_first_variable_that_is_set_decides() -> None:
    both = {"TMQ_CACHE": "/x", "XDG_CACHE_HOME": "/y"}
    assert cache_folder(both) == Path("/x")
    assert cache_folder({"TMQ_CACHE": "", "XDG_CACHE_HOME": "/y"}) == Path("/y/turbomind-quant")
    assert cache_folder({}) == Path.home() / ".cache" / "turbomind-quant"


@pytest.mark.parametrize("variable", ["TMQ_CACHE", "XDG_CACHE_HOME"])
def test_commands_and_engine_unpack_a_file_once(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMQ_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, str(tmp_path / "wanted"))
    model = tmp_path / "m.gguf"
    write_gguf(model)
    first = open_checkpoint(model).path
    assert first.is_relative_to(tmp_path / "wanted")
    assert open_source(ModelSource(str(model)), EngineConfig(device="cpu")).path == first
    assert not (tmp_path / "home").exists()


def test_a_model_of_the_hub_is_kept_in_the_same_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def snapshot(name: str, allow_patterns: list[str], cache_dir: Path) -> str:
        seen.append(cache_dir)
        raise OSError("enough seen")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setenv("TMQ_CACHE", str(tmp_path))
    with pytest.raises(Exception, match="enough seen"):
        open_checkpoint("owner/model")
    assert seen == [tmp_path / "hub"]
