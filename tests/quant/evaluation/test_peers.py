"""Peers: refused by name where they are unknown or absent; where they are there, rows of the same table on the same blocks."""

import json
from pathlib import Path

import pytest

from convert.errors import UsageError
from quant.evaluation import peers
from quant.evaluation.peers import check_peers
from tests.tiny_runs import run, write_runnable, write_text


def test_a_peer_that_is_not_there_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'gptqmodel' is not known: expected some of llm-compressor-awq"):
        check_peers(["gptqmodel"])
    monkeypatch.setitem(peers.MODULES, "auto-round", "no_such_package")
    with pytest.raises(UsageError, match="auto-round needs the package no_such_package"):
        check_peers(["auto-round"])


def test_the_table_puts_a_peer_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    model, text = write_runnable(tmp_path / "model"), write_text(tmp_path / "text.txt")

    def copy(name, source, out, tokens, quant, device):  # a peer that changes nothing
        assert tokens.shape == (4, 32) and quant.group_size == 32
        for file in source.iterdir():
            shutil.copyfile(file, out / file.name)
        return 1.5

    monkeypatch.setattr("quant.evaluation.table.quantize_with", copy)
    monkeypatch.setitem(peers.MODULES, "auto-round", "json")
    options = "--methods fp16,rtn --bits 4 --group-size 32 --samples 4 --seqlen 32 --windows 2 --eval-seqlen 64 --json"
    done = run(
        "evaluate",
        "table",
        model,
        "--calib-data",
        text,
        "--text",
        text,
        "--peers",
        "auto-round",
        *options.split(),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == ["fp16", "rtn", "auto-round"]
    assert rows[2]["ppl"] == rows[0]["ppl"] and rows[2]["seconds"] == 1.5 and rows[2]["kl"] < 1e-6
    padded = run("evaluate", "table", model, "--pad", "--peers", "auto-round", *options.split())
    assert padded.returncode == 2 and "leave --pad out" in padded.stderr
