"""Texts to judge by: the built-in sample, files as they stand, the rows of WikiText-2 rebuilt from its raw file."""

import hashlib

import pytest
import torch
from tiny_runs import write_runnable

from convert.errors import InputError, UsageError
from convert.readers import open_checkpoint
from engine.measure.perplexity import EvalTokens
from engine.model.forward import Model
from quant.evaluation.perplexity import EvalProtocol, compared, join_rows, judge, load_eval_text


def test_the_built_in_sample_is_the_default_and_of_some_length():
    text = load_eval_text(None, None)
    assert text.name == "builtin" and text == load_eval_text("builtin", None)
    assert 40_000 < len(text.text) < 80_000


def test_a_file_stands_as_it_is(tmp_path):
    (tmp_path / "t.txt").write_bytes(b" leading, \r\n trailing \n")
    text = load_eval_text(None, str(tmp_path / "t.txt"))
    assert text.text == " leading, \r\n trailing \n"
    assert text.digest == hashlib.sha256(b" leading, \r\n trailing \n").hexdigest()


def test_two_texts_are_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="give one of them"):
        load_eval_text("builtin", "t.txt")
    with pytest.raises(UsageError, match="expected one of builtin, wikitext2"):
        load_eval_text("wikitext", None)


def test_chats_are_no_text_to_judge_by(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(InputError, match="holds chats"):
        load_eval_text(None, str(tmp_path / "c.jsonl"))


def test_rows_of_wikitext_by_hand():
    assert join_rows(" \n = Title = \n \n Text .\n") == "\n\n = Title = \n\n\n\n\n Text .\n"


def test_rows_of_the_real_split(shared_data):
    # 4358 rows; "\n\n".join(rows) has 1,294,336 characters in the published dataset
    text = load_eval_text("wikitext2", str(shared_data / "wiki.test.raw"))
    assert len(text.text) == 1_294_336 and text.name == "wikitext2"


def test_the_interval_comes_from_the_same_windows(tmp_path, one_thread):
    ckpt = open_checkpoint(write_runnable(tmp_path / "model", layers=1))
    model = Model.from_checkpoint(ckpt, "cpu", torch.float32)
    ids = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0))
    tokens = EvalTokens(ids, False, "text", "digest", "tokenizer")
    first, _ = judge(model, tokens, EvalProtocol(64, 4), None, None)
    again, _ = judge(model, tokens, EvalProtocol(64, 4), None, None)
    other, _ = judge(model, tokens, EvalProtocol(64, 3), None, None)
    same = compared("again", "hf", again, first).against
    assert same is not None and same.difference == same.low == same.high == 0
    assert compared("other", "hf", other, first).against is None  # other windows: no paired interval
