"""Where the parameters of a static int8 KV cache lie: in the folder tmq/ of a checkpoint, at the root of a workspace."""

from pathlib import Path

FILE = "kv_params.safetensors"
IN_CHECKPOINT = f"tmq/{FILE}"
IN_WORKSPACE = FILE


def find_kv_parameters(folder: Path) -> Path | None:
    """The file of a checkpoint or of a workspace; None where there is none."""
    places = (folder / IN_CHECKPOINT, folder / IN_WORKSPACE)
    return next((path for path in places if path.is_file()), None)
