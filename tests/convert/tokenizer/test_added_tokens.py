"""Tokens that lie beside the tokenizer's own file get the ids that transformers gives them, or the tokenizer is refused."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tiny_models import tokenizer_document
from transformers import AutoTokenizer

from convert.errors import InputError
from convert.tokenizer.tokenizer import load_tokenizer

TEXT = "hello <|tool|> there <|turn|>\nsome words<|mid|>x"
FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}


def write(folder: Path, config: dict, **files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    (folder / "tokenizer_config.json").write_text(json.dumps(BASE | config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def next_id() -> int:
    document = tokenizer_document()
    return max(len(document["model"]["vocab"]), *(entry["id"] + 1 for entry in document["added_tokens"]))


def decoder(*texts: str, special: bool = True) -> dict:
    first = next_id()
    return {str(first + i): {"content": text, "special": special, **FLAGS} for i, text in enumerate(texts)}


CASES = {
    "K122-decoder": ({"added_tokens_decoder": decoder("<|tool|>", "<|turn|>")}, {}),
    "K122-decoder-plain": ({"added_tokens_decoder": decoder("<|tool|>", special=False)}, {}),
    "K122-additional": ({"additional_special_tokens": ["<|turn|>", "<|tool|>"]}, {}),
    "K122-eos": ({"eos_token": "<|turn|>"}, {}),
    "K122-map": ({"eos_token": None}, {"special_tokens_map": {"eos_token": {"content": "<|mid|>", **FLAGS}}}),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    config, files = CASES[case]
    folder = write(tmp_path, {k: v for k, v in (BASE | config).items()}, **files)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    expected = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, add_bos=False) == expected
    assert max(expected) >= next_id()  # the added token is there
    if theirs.eos_token_id is not None:
        assert theirs.eos_token_id in ours.eos_token_ids


def sentencepiece_model(folder: Path) -> Path:
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("\n".join("some words of a small corpus hello there user assistant" for _ in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


def test_K122_added_tokens_json_beside_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_model(tmp_path / "m")
    (folder / "added_tokens.json").write_text(json.dumps({"<|turn|>": 300, "<|tool|>": 301}))
    names = {"bos_token": "<s>", "eos_token": "<|turn|>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    ours = load_tokenizer(folder)
    ids = ours.encode("hello<|turn|>there<|tool|>", add_bos=False)
    assert ids.count(300) == 1 and ids.count(301) == 1
    assert 300 in ours.eos_token_ids and ours.decode(ids).split() == ["hello", "there<|tool|>"]


def test_K122_ids_that_no_reader_gives_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {}, added_tokens={"<|turn|>": next_id() + 5})
    with pytest.raises(InputError, match=rf"<\|turn\|>' the id {next_id() + 5}, but behind its vocabulary"):
        load_tokenizer(tmp_path)
    write(tmp_path, {}, added_tokens={"<|turn|>": "x"})
    with pytest.raises(InputError, match="expected a whole number"):
        load_tokenizer(tmp_path)


def test_K123_a_named_token_that_is_no_single_id_is_told(tmp_path: Path) -> None:
    notes = load_tokenizer(write(tmp_path, {"pad_token": "[PAD]"})).notes
    assert len(notes) == 1 and "'[PAD]' as its pad token" in notes[0]
    assert load_tokenizer(write(tmp_path, {})).notes == []
