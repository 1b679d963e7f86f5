"""Files of strangers, read in bounded memory: text data sets, workspaces, damaged content of every kind, sources that change."""

import json
import os
from pathlib import Path

import pytest
from tiny_models import write_model
from tiny_runs import FAST, run, write_runnable, write_text

from calib_data.readers import read_corpus
from calib_data.sources import TextRequest, Vocabulary, load_blocks
from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.files import file_digests
from convert.folder.output import OutputFolder
from convert.folder.source_files import SourceFiles
from convert.folder.unchanged import Unchanged
from convert.readers import open_checkpoint
from convert.tokenizer.bounds import refuse_growth
from convert.turbomind.config import parse_config_yaml


class Chats:
    """One id a message; refuses chats that begin with the assistant."""

    def encode_plain(self, text: str) -> list[int]:
        return [1] * len(text.split())

    def apply_chat_template(self, messages: list, add_generation_prompt: bool = True) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InputError("the chat template refuses these messages: roles must alternate.")
        assert all(isinstance(message["content"], str) for message in messages)
        return [1] * 8

    def digest(self) -> str:
        return "chats"


def lines(path: Path, records: list) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def chat(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "some words"} for role in roles]}


@pytest.mark.parametrize("value", [5, True, 1.5, None], ids=lambda v: f"J113-{v}")
def test_lines_that_are_numbers_are_counted(value: object, tmp_path: Path) -> None:
    good = {"text": "some words of prose"}
    corpus = read_corpus(lines(tmp_path / "x.jsonl", [good] * 60 + [value]))
    assert corpus.skipped == 1 and "line 61" in corpus.notes[0]
    with pytest.raises(InputError, match="30 of 90 records are unusable"):
        read_corpus(lines(tmp_path / "y.jsonl", [good] * 60 + [value] * 30))


def test_J111_a_number_of_many_digits_in_a_line_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps({"text": "some words"})] * 60 + ['{"text": ' + "9" * 6000 + "}"]))
    assert read_corpus(path).skipped == 1
    (tmp_path / "x.json").write_text("[" + "9" * 6000 + "]")
    with pytest.raises(InputError, match="is not JSON"):
        read_corpus(tmp_path / "x.json")


def test_K129_a_chat_that_the_template_refuses_is_skipped_counted_and_named(tmp_path: Path) -> None:
    records = [chat("user", "assistant")] * 60
    records.insert(30, chat("assistant", "user"))
    request = TextRequest(str(lines(tmp_path / "x.jsonl", records)), 2, 8, 0)
    text = load_blocks(request, Chats(), Vocabulary(10))
    assert text.provenance["records_skipped"] == 1
    assert any("line 31: the chat template refuses" in note for note in text.warnings)
    request = TextRequest(str(lines(tmp_path / "y.jsonl", [chat("assistant")] * 10 + records[:20])), 2, 8, 0)
    with pytest.raises(InputError, match="line 1: the chat template refuses"):
        load_blocks(request, Chats(), Vocabulary(10))


def test_K130_content_in_parts_and_calls_without_content(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "some "}, {"type": "text", "text": "words"}]
    function = {"name": "weather", "arguments": '{"place": "here"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    answer = {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    records = [{"messages": [{"role": "user", "content": parts}, call, answer]}] * 3
    (document, *_) = read_corpus(lines(tmp_path / "x.jsonl", records)).documents
    assert document[0] == {"role": "user", "content": "some words"}
    assert document[1]["content"] == ""
    assert document[1]["tool_calls"][0]["function"]["arguments"] == {"place": "here"}
    assert document[2] == answer
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    with pytest.raises(InputError, match="a part of a message is image_url instead of text"):
        read_corpus(lines(tmp_path / "y.jsonl", [image]))


def test_K131_windows_line_ends_give_the_same_text_and_are_told(tmp_path: Path) -> None:
    (tmp_path / "lf.txt").write_bytes(b" = Title = \n\nsome words\n")
    (tmp_path / "crlf.txt").write_bytes(b" = Title = \r\n\r\nsome words\r\n")
    (tmp_path / "mixed.txt").write_bytes(b"a\r\nb\n")
    plain, windows, mixed = (read_corpus(tmp_path / f"{name}.txt") for name in ("lf", "crlf", "mixed"))
    assert windows.documents == plain.documents and not plain.notes
    assert "3 line ends are CR LF" in windows.notes[0]
    assert mixed.documents == ["a\r\nb\n"]  # part of the text, not of the file's form


def parquet(path: Path, values: object, **options: object) -> Path:
    import pyarrow
    from pyarrow import parquet as library

    library.write_table(pyarrow.table({"text": values}), path, **options)
    return path


def test_J110_rows_that_repeat_are_held_once_and_huge_ones_refused(tmp_path: Path) -> None:
    import pyarrow

    # one value for 20 rows, in a dictionary: 8 MiB and not 160
    path = parquet(tmp_path / "same.parquet", pyarrow.array(["a" * 2**23] * 20), compression="zstd")
    before = pyarrow.total_allocated_bytes()
    corpus = read_corpus(path, limit=2**24)
    assert len(corpus.documents) == 2 and pyarrow.total_allocated_bytes() - before < 2**26
    path = parquet(tmp_path / "huge.parquet", pyarrow.array(["a" * (65 * 2**20)]), compression="zstd")
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match=r"has a group of 1 rows and [\d,]+ bytes"):
        read_corpus(path)


def test_J111_parquet_columns_that_hold_no_text(tmp_path: Path) -> None:
    import datetime

    for number, values in enumerate(
        ([b"\xff\xfe"], [datetime.date(2020, 1, 1)], [datetime.timedelta(1)], [1.5])
    ):
        with pytest.raises(InputError, match="instead of text"):
            read_corpus(parquet(tmp_path / f"{number}.parquet", values))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"\0" * 40 + b"PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_corpus(tmp_path / "cut.parquet")


# J108: products of numbers that are each within their bounds


def test_J108_layers_times_experts_are_held_against_the_files(tmp_path: Path) -> None:
    write_model(tmp_path, "mixtral", num_hidden_layers=4096, num_local_experts=1024)
    with pytest.raises(InputError, match=r"4,096 layers and 1,024 experts need more than [\d,]+ tensors"):
        open_checkpoint(tmp_path)


def test_J109_yaml_is_bounded_before_it_is_told() -> None:
    aliases = "a0: &a0 [x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    base = "attention_config: {}\nmodel_config:\n  model_arch: LlamaForCausalLM\n  "
    for text, word in (
        (aliases + base + "expert_num: *a29\n", "expected"),
        (base + "expert_num: []\n  inter_size: [16]\n  tp: 1000000000000\n", "from 0 to"),
        ("x: &x {a: 1}\ny: {<<: *x}\n" + base, "merge key"),
        ("x: " + "[" * 3000 + "\n", "config.yaml"),
        (base + "expert_num: 1970-99-99\n", "config.yaml"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            parse_config_yaml(text, "config.yaml")
        assert len(str(caught.value)) < 1500


def test_J108_a_tokenizer_whose_rules_blow_a_text_up(tmp_path: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
    with pytest.raises(InputError, match="would fill the memory"):
        refuse_growth({"normalizer": {"type": "Sequence", "normalizers": [step] * 5}}, "x")
    refuse_growth({"normalizer": {"type": "Sequence", "normalizers": [step] * 4}}, "x")


# J111: the border itself


def test_J111_every_failure_of_a_reader_becomes_the_named_error() -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (KeyError("x"), RecursionError(), AttributeError("y"), panic("z"), ZeroDivisionError()):
        with pytest.raises(InputError, match=r"m\.json is damaged") as caught, reading("m.json"):
            raise error
        assert caught.value.__cause__ is error
    for passed in (KeyboardInterrupt(), SystemExit(), OSError(28, "full"), MemoryError()):
        with pytest.raises(type(passed)), reading("m.json"):
            raise passed


# J115, J116: sources that change, and whose fault an error is


def test_J115_the_digest_decides_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    state = os.stat(path)
    watched = Unchanged([path])
    watched.remember(file_digests([path]))
    path.chmod(0o600)  # the time of the inode moves, the content does not
    watched.check()
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(InputError, match="was changed while it was in use"):
        watched.check()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_J115_small_files_are_those_of_the_start(name: str, tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    ckpt = open_checkpoint(model)
    (model / name).write_text((model / name).read_text() + " ")
    with pytest.raises(InputError, match=rf"{name} was changed"):
        ckpt.check_unchanged()
    with pytest.raises(InputError, match=rf"{name} was changed"):
        ckpt.beside.read(name)


def test_J116_a_source_that_fails_is_not_the_outputs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.txt"
    source.write_bytes(b"1" * 100)
    real = os.fdopen

    class Failing:
        def __init__(self, file: object) -> None:
            self.file = file

        def read(self, count: int) -> bytes:
            raise OSError(5, "Input/output error")

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    with OutputFolder.begin(tmp_path / "out", {}, layout="root") as out:
        monkeypatch.setattr(
            os, "fdopen", lambda *a, **k: Failing(real(*a, **k)) if a[1] == "rb" else real(*a, **k)
        )
        with pytest.raises(Exception, match=r"Reading .*source\.txt failed: Input/output error"):
            out.copy(source, "copy.txt")


def test_K124_templates_in_a_subfolder_survive_and_the_rest_is_listed(tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    assert SourceFiles(model).left_out == ["original/ (1 files)"]
    done = run("quantize", "awq", model, "-o", tmp_path / "o", "--preset", "rtn", *FAST)
    assert done.returncode == 0 and "original/ (1 files)" in done.stderr
    copied = tmp_path / "o" / "additional_chat_templates" / "tool_use.jinja"
    assert copied.read_text() == "{{ messages }}"


def test_K132_a_path_that_is_absent_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    words = write_text(tmp_path / "t.txt")
    done = run(
        "evaluate", "ppl", model, tmp_path / "nothere", "--text", words, "--seqlen", 32, "--windows", 2
    )
    assert done.returncode == 3 and "nothere" in done.stderr and "ppl" not in done.stdout
