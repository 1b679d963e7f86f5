"""Is an unfinished run the one that is asked for now? Compares fingerprints field by field, and says what differs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show

SOURCE = "source"  # the field of the digest of the weights that a run reads


def refuse_other_run(old: Any, new: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError naming what differs between the fingerprint in `folder` and that of this run: weights, settings or both."""
    if not isinstance(old, dict):
        raise InputError(
            f"run.json of {show(str(folder))} has no fingerprint. Discard the run with --restart."
        )
    other = [key for key in sorted(set(old) | set(new)) if old.get(key) != new.get(key)]
    settings = [
        f"{key} was {_brief(old.get(key))}, is {_brief(new.get(key))}" for key in other if key != SOURCE
    ]
    if SOURCE in other:
        told = f" Other settings too: {'; '.join(settings)}." if settings else ""
        raise InputError(
            f"the weights of the source have changed since the unfinished run in {show(str(folder))} began, or another model is named "
            f"(digest was {_brief(old.get(SOURCE))}, is {_brief(new.get(SOURCE))}).{told} --restart discards that run and begins anew; "
            "with the earlier weights in place it resumes."
        )
    if settings:
        raise InputError(
            f"{show(str(folder))} holds an unfinished run with other settings: {'; '.join(settings)}. Give the earlier "
            "settings to resume it, or --restart to discard it."
        )


def _brief(value: Any) -> str:
    return show(json.dumps(value, sort_keys=True, ensure_ascii=False), 80)
