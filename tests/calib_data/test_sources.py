"""Files, folders, chats and generated text to blocks, on a tokenizer of single bytes."""

import json
from pathlib import Path

import pytest
import torch

from calib_data import readers
from calib_data.hub import HubDataset, parse_name
from calib_data.sources import TextRequest, Vocabulary, load_blocks
from convert.errors import InputError


class Bytes:
    """One id a byte; a chat is <role>content, where the role's id is 256 or 257."""

    def encode_plain(self, text):
        return list(text.encode())

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert not add_generation_prompt
        ids = []
        for message in messages:
            ids += [256 if message["role"] == "user" else 257, *message["content"].encode()]
        return ids

    def digest(self):
        return "bytes"


VOCABULARY = Vocabulary(258)


def load(path, samples=2, seqlen=16, **kwargs):
    return load_blocks(TextRequest(str(path), samples, seqlen, 0, **kwargs), Bytes(), VOCABULARY)


def test_text_file_as_it_stands(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "a.txt").write_text(text)
    found = load(tmp_path / "a.txt")
    assert found.tokens.shape == (2, 16)
    assert all(bytes(row.tolist()).decode() in text for row in found.tokens)
    assert found.provenance["source"] == "a.txt"
    assert str(tmp_path) not in json.dumps(found.provenance)


def test_a_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 40)
    (tmp_path / "a.md").write_text("a" * 40)
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    found = load(tmp_path, samples=1, seqlen=82, allow_fewer=True)
    assert bytes(found.tokens[0].tolist()) == b"a" * 40 + b"\n\n" + b"b" * 40


def test_jsonl_text_and_chats_by_the_template(tmp_path):
    rows = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(tmp_path / "d.jsonl", samples=1, seqlen=15, allow_fewer=True)
    expected = [*b"plain", 256, *b"hi", 257, *b"ho", 256, *b"a", 257, *b"b"]
    assert found.tokens[0].tolist() == expected


def test_parquet_column_by_name(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({"content": ["first " * 10, None, *["more " * 9] * 30]}), tmp_path / "d.parquet"
    )
    with pytest.raises(InputError, match=r'no column "text" \(found: content\).*--text-column'):
        load(tmp_path / "d.parquet")
    found = load(tmp_path / "d.parquet", column="content")
    assert found.provenance["records_skipped"] == 1 and "row 1" in found.warnings[0]


def test_a_large_text_is_read_in_part_and_says_so(tmp_path):
    (tmp_path / "big.txt").write_text("é" * 3000)
    corpus = readers.read_corpus(tmp_path / "big.txt", limit=1001)
    assert corpus.documents == ["é" * 500]  # the cut character is dropped whole
    assert corpus.bytes_unread == 4999 and "unread" in corpus.notes[0]
    (tmp_path / "big.jsonl").write_text('{"text": "0123456789"}\n' * 100)
    corpus = readers.read_corpus(tmp_path / "big.jsonl", limit=240)
    assert len(corpus.documents) == 10 and corpus.bytes_unread == 100 * 23 - 230


def test_generated_text_is_the_models_own_and_follows_the_seed():
    seen = []

    def generate(prompts, length, seed, barred):
        seen.append((prompts, barred))
        generator = torch.Generator().manual_seed(seed)
        more = torch.randint(0, 200, (prompts.shape[0], length - prompts.shape[1]), generator=generator)
        return torch.cat([prompts, more], dim=1)

    vocabulary = Vocabulary(258, special_ids=(256, 257), bos=256)
    request = TextRequest(None, 4, 32, 7)
    first = load_blocks(request, Bytes(), vocabulary, generate)
    again = load_blocks(request, Bytes(), vocabulary, generate)
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance["source"] == "generated"
    prompts, barred = seen[0]
    assert barred == (256, 257) and (prompts[:, 0] == 256).all() and (prompts[:, 1] < 256).all()


def test_without_text_and_generator_the_choice_is_named():
    with pytest.raises(InputError, match="--calib-data FILE"):
        load_blocks(TextRequest(None, 4, 32, 7), Bytes(), VOCABULARY)


def test_names_of_the_hub():
    assert parse_name("c4").name == "allenai/c4"
    assert parse_name("owner/name:test") == HubDataset("owner/name", "test")
    assert parse_name("no such file.txt") is None


def test_a_parquet_file_that_ends_its_library_is_a_named_error(tmp_path):
    """465 bytes on which the library aborts the process: found by the fuzzer, kept in its corpus."""
    root = Path(__file__).resolve().parents[2]
    damaged = root / "scripts" / "fuzz" / "corpus" / "parquet" / "library-aborts"
    (tmp_path / "d.parquet").write_bytes(damaged.read_bytes())
    with pytest.raises(
        InputError, match=r"d\.parquet cannot be read as parquet: it is damaged .* Write it anew"
    ):
        load(tmp_path / "d.parquet")
