"""Group B of the fault table: calibration data. One test id a case. The cases of a whole run stand in test_b_runs.py."""

import gzip
import json

import pytest
import torch

from calib_data.hub import HubDataset, read_dataset
from calib_data.readers import read_corpus
from calib_data.sources import TextRequest, Vocabulary, load_blocks
from convert.errors import InputError


class Words:
    """One id a word, by its length."""

    def encode_plain(self, text):
        return [len(word) for word in text.split()]

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert not add_generation_prompt
        return [1] * len(messages)

    def digest(self):
        return "words"


PROSE = "some words of differing lengths make a text that can be cut into samples " * 40

UNREADABLE = {
    "B21-missing": (None, "neither a file or folder"),
    "B21-empty": (b"", "holds no text"),
    "B21-white-space": (b" \n\t\n", "holds no text"),
    "B21-not-utf8": (b"caf\xe9 au lait", "not UTF-8: byte 3 is 0xe9"),
    "B21-utf16": ("text".encode("utf-16"), "UTF-16"),
    "B21-gzip": (gzip.compress(b"text"), "gzip file: unpack"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_text(case, tmp_path):
    raw, message = UNREADABLE[case]
    path = tmp_path / "text.txt"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        load_blocks(TextRequest(str(path), 1, 8, 0), Words(), Vocabulary(100))


BROKEN_LINES = {
    "B22-broken-line": ("{not json", "line 3: not JSON"),
    "B22-missing-column": ('{"body": "x"}', r'line 3: no column "text" \(found: body\)'),
    "B22-null": ('{"text": null}', 'line 3: "text" is null instead of text'),
    "B22-number": ('{"text": 5}', 'line 3: "text" is int instead of text'),
    "B22-array": ("[1, 2]", "line 3: list instead of an object"),
    "B22-deep": ("[" * 100_000, "line 3: not JSON"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_broken_line_is_counted_or_stops_the_run(case, tmp_path):
    line, message = BROKEN_LINES[case]
    good = json.dumps({"text": PROSE})
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join([good, good, line, *[good] * 60]))
    corpus = read_corpus(few)
    assert corpus.skipped == 1 and len(corpus.documents) == 62
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(corpus.notes[0])
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join([good, good, line, line]))
    with pytest.raises(InputError, match=f"2 of 4 records are unusable .*{message}"):
        read_corpus(many)


@pytest.mark.parametrize("case", ["B23-fewer-than-asked"])
def test_fewer_samples_than_asked(case, tmp_path):
    (tmp_path / "t.txt").write_text(PROSE)
    total = len(PROSE.split())
    with pytest.raises(InputError, match=f"{total} tokens: {total // 16} samples"):
        load_blocks(TextRequest(str(tmp_path / "t.txt"), 1000, 16, 0), Words(), Vocabulary(100))
    found = load_blocks(
        TextRequest(str(tmp_path / "t.txt"), 1000, 16, 0, allow_fewer=True), Words(), Vocabulary(100)
    )
    assert found.tokens.shape[0] == total // 16


@pytest.mark.parametrize("case", ["B24-one-token"])
def test_repeated_text_warns(case, tmp_path):
    (tmp_path / "t.txt").write_text("la " * 4000)
    found = load_blocks(TextRequest(str(tmp_path / "t.txt"), 8, 64, 0), Words(), Vocabulary(100))
    assert any("samples differ" in warning for warning in found.warnings)
    assert any("100% of the calibration text" in warning for warning in found.warnings)


@pytest.mark.parametrize("case", ["B25-no-network", "B26-loading-script"])
def test_hub_failures_list_local_choices(case, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise (
            ConnectionError("Couldn't reach the Hub")
            if case == "B25-no-network"
            else RuntimeError("Dataset scripts are no longer supported, but found x.py")
        )

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"--calib-data FILE or FOLDER") as caught:
        read_dataset(HubDataset("owner/name", "train"), "text", 1000)
    assert "loading script" in str(caught.value) and "owner/name" in str(caught.value)


@pytest.mark.parametrize("case", ["B25-wrong-name"])
def test_wrong_name_lists_choices(case):
    with pytest.raises(InputError, match=r"wikitext2, c4, pileval"):
        load_blocks(TextRequest("wikitext3", 1, 8, 0), Words(), Vocabulary(100))


@pytest.mark.parametrize("case", ["B28-ids-outside-vocabulary"])
def test_tokenizer_of_another_model(case, tmp_path):
    (tmp_path / "t.txt").write_text(PROSE)
    with pytest.raises(InputError, match="belongs to another model"):
        load_blocks(TextRequest(str(tmp_path / "t.txt"), 1, 8, 0), Words(), Vocabulary(5))


@pytest.mark.parametrize("case", ["B29-streamed"])
def test_a_huge_dataset_is_streamed(case, monkeypatch):
    import datasets

    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield {"text": PROSE}

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: endless())
    corpus = read_dataset(HubDataset("owner/huge", "train"), "text", tokens_wanted=1000)
    assert drawn == len(corpus.documents) < 1000
    assert corpus.bytes_read >= 2**20


def test_blocks_of_the_hub_are_sampled_as_any_text(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"text": PROSE}] * 3))
    found = load_blocks(TextRequest("wikitext2", 2, 8, 0), Words(), Vocabulary(100))
    assert found.tokens.dtype == torch.int64 and found.tokens.shape == (2, 8)
