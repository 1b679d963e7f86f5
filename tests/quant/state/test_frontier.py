"""Saved states: the newest whole one is used, damaged ones are passed over, nothing is taken on trust."""

import pytest
import torch

from quant.state.frontier import Frontier


def fill(folder, upto):
    frontier = Frontier(folder)
    for index in range(upto):
        frontier.record(index, {"index": index})
        frontier.save(index + 1, {"x": torch.full((3,), float(index + 1))})
    return frontier


def test_the_newest_state_and_all_records_come_back(tmp_path):
    fill(tmp_path, 3)
    found = Frontier(tmp_path).resume(lambda i: True)
    assert found.first == 3 and found.tensors["x"].tolist() == [3, 3, 3]
    assert [record["index"] for record in found.records] == [0, 1, 2]
    assert len(list(tmp_path.glob("stream-*.safetensors"))) == 1  # older ones are dropped


def test_an_empty_folder_begins_anew(tmp_path):
    assert Frontier(tmp_path).resume(lambda i: True).first == 0


def test_a_cut_state_is_not_used(tmp_path):
    fill(tmp_path, 2)
    path = next(tmp_path.glob("stream-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    frontier = Frontier(tmp_path)
    assert frontier.resume(lambda i: True).tensors is None
    assert "damaged" in frontier.notes[0]


def test_a_zero_length_state_is_not_used(tmp_path):
    fill(tmp_path, 2)
    next(tmp_path.glob("stream-*.safetensors")).write_bytes(b"")
    assert Frontier(tmp_path).resume(lambda i: True).first == 0


def test_a_state_without_its_mark_is_not_used(tmp_path):
    fill(tmp_path, 2)
    next(tmp_path.glob("stream-*.json")).unlink()
    assert Frontier(tmp_path).resume(lambda i: True).first == 0


def test_a_lost_record_or_shard_sends_the_run_back(tmp_path):
    fill(tmp_path, 2)
    assert Frontier(tmp_path).resume(lambda i: i != 0).first == 0
    fill(tmp_path, 2)
    (tmp_path / "layer-00001.json").write_text("{half")
    assert Frontier(tmp_path).resume(lambda i: True).first == 0


def test_a_crash_between_two_states_leaves_the_older_one(tmp_path):
    frontier = fill(tmp_path, 1)
    frontier.record(1, {"index": 1})
    (tmp_path / "stream-00002.safetensors").write_bytes(
        b"half of it"
    )  # renamed by a kernel that lost its data
    found = Frontier(tmp_path).resume(lambda i: True)
    assert found.first == 1 and found.tensors["x"].tolist() == [1, 1, 1]


def test_temporaries_of_a_crash_are_removed(tmp_path):
    (tmp_path / ".stream-00001.safetensors.tmq-tmp").write_bytes(b"half")
    Frontier(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    ["[1]", '{"reports": 7}', '{"record": {"reports": []}, "digest": "x"}', "NaN", ""],
    ids=lambda d: f"J111-{d[:12]}",
)
def test_a_record_of_another_shape_is_made_again(damage: str, tmp_path) -> None:
    frontier = Frontier(tmp_path)
    frontier.record(0, {"reports": [1]})
    frontier.save(1, {"fp": torch.ones(2)})
    assert Frontier(tmp_path).resume(lambda index: True).records == [{"reports": [1]}]
    (tmp_path / "layer-00000.json").write_text(damage)
    assert Frontier(tmp_path).resume(lambda index: True).first == 0
