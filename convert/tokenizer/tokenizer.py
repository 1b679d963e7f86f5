"""One tokenizer for every family: text to ids and back, the model's own rule for BOS, and the chat template.

Control tokens are made by the template and by `encode` alone. `encode_plain` and `apply_chat_template` keep control-token
strings in a user's text as text. Knows no model.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.files import json_bytes, sha256_bytes
from convert.folder.json_files import show
from convert.tokenizer.bounds import refuse_growth
from convert.tokenizer.byte_level import BYTE_OF_CHARACTER
from convert.tokenizer.chat_template import ChatTemplate, control_mark
from convert.tokenizer.files import TokenizerFiles, has_tokenizer_file, read_tokenizer_files
from convert.tokenizer.sentencepiece import SPACE

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of a model folder. Raises InputError when it is missing, damaged, or exists only as code."""
    return Tokenizer(read_tokenizer_files(Path(folder), trust_remote_code), str(folder))


def check_tokenizer(folder: Path) -> int | None:
    """The number of ids of a folder's tokenizer; None where it has none, or only code, which is not run.

    Raises InputError where it is damaged or of an unknown kind. One that loads but that no reader of ours takes passes.
    """
    if not has_tokenizer_file(folder):
        return None
    document = read_tokenizer_files(folder).document
    return int(_build(document, str(folder)).get_vocab_size(with_added_tokens=True))


class Tokenizer:
    """Token ids are those of the model. `bos_id` is the BOS that the model's rule puts before a text, None where none.

    `notes`: remarks for the user.
    """

    def __init__(self, files: TokenizerFiles, name: str = "") -> None:
        with reading(f"the tokenizer of {name}"):
            self._take_in(files, name)

    def _take_in(self, files: TokenizerFiles, name: str) -> None:
        self.name = name
        document = deepcopy(files.document)
        document["truncation"] = document["padding"] = None
        added = document.get("added_tokens") or []
        self._added: dict[int, str] = {entry["id"]: entry["content"] for entry in added}
        self._control: dict[str, int] = {entry["content"]: entry["id"] for entry in added if entry["special"]}
        self.control_ids = frozenset(self._control.values())
        self._fast = _build(document, name)
        moved = [
            entry["content"] for entry in added if self._fast.token_to_id(entry["content"]) != entry["id"]
        ]
        if moved:
            raise InputError(
                f"{show(name)}: {len(moved)} added tokens of the tokenizer have ids that no reader gives them, the first is "
                f"{show(moved[0])!r}. Copy the tokenizer again."
            )
        guarded = {**document, "post_processor": None}
        guarded["added_tokens"] = [
            {**entry, "content": control_mark(entry["id"])} if entry["special"] else entry for entry in added
        ]
        guarded["model"] = _without_control_pieces(document["model"], added)
        self._guarded = _build(guarded, name)
        self._true_id = self._renumbered(guarded["added_tokens"])
        self.vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)
        self._byte_level = _mentions(document.get("decoder"), "ByteLevel")
        if not self._byte_level and not _mentions(document.get("decoder"), "ByteFallback", "Metaspace"):
            raise InputError(
                f"{show(name)}: the tokenizer decodes neither bytes nor sentencepiece tokens; it is not supported."
            )
        self._strips_space = not self._byte_level and _mentions(document.get("decoder"), "Strip", "Metaspace")
        names = {key: _token_text(files.names.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")}
        self.token_names = {key: text for key, text in names.items() if text is not None}
        self.notes = [
            f"the tokenizer names {show(text)!r} as its {key} token, which is no single id of it: it stays text"
            for key, text in self.token_names.items()
            if self._id_of(text) is None
        ]
        self.bos_id = self._bos_rule(files)
        eos = self._id_of(names["eos"])
        self.eos_token_ids = tuple(dict.fromkeys([*files.eos_ids, *([] if eos is None else [eos])]))
        self._document, self._template_source = document, files.chat_template
        self._template: ChatTemplate | None = None

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text in which control-token strings are control tokens. add_bos None: by the model's rule, at most one."""
        return self._with_bos(self._encoded(self._fast, _clean(text)), add_bos)

    def encode_plain(self, text: str, add_bos: bool | None = False) -> list[int]:
        """Ids of a text in which control-token strings stay text. add_bos None: by the model's rule."""
        return self._with_bos(self._plain(_clean(text)), add_bos)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation ({"role", "content"}), by the model's template. Raises InputError when there is none or it fails."""
        return self._plain(_clean(self.template.render(messages, add_generation_prompt, tools, variables)))

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises InputError where the model has none."""
        if self._template_source is None:
            raise InputError(
                f"{show(self.name)} has no chat template: it is no chat model. Complete plain text instead."
            )
        if self._template is None:
            variables = {f"{key}_token": text for key, text in self.token_names.items()}
            self._template = ChatTemplate(self._template_source, self._control, variables)
        return self._template

    @property
    def document_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return json.dumps(self._document, ensure_ascii=False)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no ordinary text: control tokens and every other added token."""
        return frozenset(self._added)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD. One leading space of a sentencepiece text is dropped."""
        decoder = IncrementalDecoder(self, skip_special)
        text = "".join(decoder.push(index) for index in ids) + decoder.flush()
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def decoder(self) -> "IncrementalDecoder":
        """A decoder for one new sequence, which goes on behind a prompt."""
        return IncrementalDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character; a control token's are its name.

        Empty for an id that no token has.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            if all(character in BYTE_OF_CHARACTER for character in token):
                return bytes(BYTE_OF_CHARACTER[character] for character in token)
            return str(token).encode()
        if byte := _BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return str(token).replace(SPACE, " ").encode()

    def digest(self) -> str:
        """sha256 of all that decides the ids: the tokenizer's document, its rule for BOS and its chat template."""

        return sha256_bytes(
            json_bytes({"document": self._document, "bos": self.bos_id, "template": self._template_source})
        )

    def check_fits(self, vocab_size: int) -> None:
        """Raises InputError when the tokenizer has ids that a model of `vocab_size` embeddings lacks."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"{show(self.name)}: the tokenizer has ids up to {self.vocab_size - 1}, but the model has {vocab_size} embeddings: "
                "they belong to different models."
            )

    def _plain(self, text: str) -> list[int]:
        ids = self._encoded(self._guarded, text)
        return [self._true_id.get(index, index) for index in ids]

    def _encoded(self, fast: FastTokenizer, text: str) -> list[int]:
        with reading(f"the tokenizer of {self.name}"):
            ids: list[int] = fast.encode(text, add_special_tokens=False).ids
        return ids

    def _with_bos(self, ids: list[int], add_bos: bool | None) -> list[int]:
        bos = self.bos_id if add_bos is None else self._any_bos if add_bos else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _bos_rule(self, files: TokenizerFiles) -> int | None:
        stated = self._id_of(self.token_names.get("bos"))
        front = self._fast.encode("a", add_special_tokens=True).ids[:1]
        by_document = front[0] if front and front[0] in self._added else None
        self._any_bos = stated if stated is not None else by_document
        if files.add_bos is None:
            return by_document
        return self._any_bos if files.add_bos else None

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._fast.token_to_id(token)

    def _renumbered(self, added: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """Ids that the guarded copy gives to added tokens -> the model's: renamed tokens are numbered anew behind the vocabulary."""
        pairs = ((self._guarded.token_to_id(entry["content"]), entry["id"]) for entry in added)
        return {given: true for given, true in pairs if given is not None and given != true}


class IncrementalDecoder:
    """Text of a growing sequence in whole characters: bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Characters that this token completes."""
        if self._skip and token_id in self._tokenizer.control_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: an unfinished character as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _build(document: Mapping[str, Any], name: str) -> FastTokenizer:
    with reading(f"the tokenizer of {name}"):
        refuse_growth(document, name)
        try:
            return FastTokenizer.from_str(json.dumps(document, ensure_ascii=False))
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                f"the tokenizer of {show(name)} is damaged or of an unknown kind: {show(str(error))}."
            ) from error


def _without_control_pieces(model: Any, added: Sequence[Mapping[str, Any]]) -> Any:
    """A unigram model finds any piece of its vocabulary in a text, control tokens too: they get names that no text has."""
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        return model
    control = {entry["id"] for entry in added if entry["special"]}
    vocab = [
        [control_mark(i) if i in control else piece, score] for i, (piece, score) in enumerate(model["vocab"])
    ]
    return {**model, "vocab": vocab}


def _clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not _is_valid(text) else text


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mentions(decoder: Any, *kinds: str) -> bool:
    if isinstance(decoder, dict):
        return decoder.get("type") in kinds or any(_mentions(value, *kinds) for value in decoder.values())
    return isinstance(decoder, list) and any(_mentions(item, *kinds) for item in decoder)


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object that holds it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
