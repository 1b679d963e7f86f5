"""Rows of a table that is not finished, kept in the cache: the same command, given again after Ctrl-C, goes on behind them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calib_data.blocks import CalibrationSet, tokens_digest
from convert.errors import InputError, ResourceError
from convert.folder.cache import cache_folder
from convert.folder.files import json_bytes, make_folder, sha256_bytes, write_json
from convert.folder.state import read_signed, self_digest
from engine.measure.perplexity import EvalTokens
from quant.config import QuantConfig
from quant.evaluation.perplexity import EvalProtocol
from quant.session import Session
from quant.state.fingerprint import run_fingerprint


class KeptRows:
    """One file a row, named by all that the row follows from: model, text, settings, versions, machine. `cache` None: the user's."""

    def __init__(
        self,
        session: Session,
        protocol: EvalProtocol,
        tokens: EvalTokens,
        text: CalibrationSet | None,
        cache: Path | None = None,
    ) -> None:
        self.session = session
        self.folder = (cache_folder() if cache is None else cache) / "rows"
        self._facts: dict[str, Any] = {"judged": [asdict(protocol), tokens_digest(tokens.ids), tokens.bos]}
        if text is not None:
            self._facts["calibration"] = text.provenance["tokens_sha256"]
        self._used: set[Path] = set()

    def find(self, quant: QuantConfig, cache: tuple[int, str]) -> dict[str, Any] | None:
        """The fields of a row that an earlier start finished, or None."""
        path = self._path(quant, cache)
        if not path.is_file():
            return None
        try:
            row = read_signed(path).get("row")
        except InputError:  # it was cut: the row is made again
            return None
        self._used.add(path)
        return row if isinstance(row, dict) else None

    def keep(self, quant: QuantConfig, cache: tuple[int, str], row: Mapping[str, Any]) -> None:
        """Keep a finished row. A cache that cannot be written keeps nothing, which costs time alone."""
        path = self._path(quant, cache)
        document = {"row": dict(row)}
        try:
            make_folder(self.folder)
            write_json(path, document | {"digest": self_digest(document)})
        except (ResourceError, ValueError):  # a full disk; a perplexity that is no number
            return
        self._used.add(path)

    def discard(self) -> None:
        """Forget the rows of this table: it is finished."""
        for path in self._used:
            path.unlink(missing_ok=True)

    def _path(self, quant: QuantConfig, cache: tuple[int, str]) -> Path:
        facts = run_fingerprint("evaluate table", self.session, quant, self._facts | {"cache": list(cache)})
        return self.folder / f"{sha256_bytes(json_bytes(facts))[:32]}.json"
