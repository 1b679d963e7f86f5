"""A TurboMind workspace back into a Hugging Face folder: AWQ where it is int4, float otherwise. Codes and scales stay as they are.

Also for workspaces that LMDeploy wrote: without a manifest, and without config.json, which is then made from the configuration of the
workspace. Padding and copied KV heads go where config.json tells the true sizes, and stay where it is absent.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.awq.writer import AwqWriter
from convert.checkpoint import Stored
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families.table import BY_NAME, linear_shapes
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place
from convert.folder.json_files import read_object, show
from convert.folder.output import OutputFolder
from convert.hf.config import updated_config
from convert.hf.config_reader import FIELDS
from convert.turbomind.reader import WorkspaceCheckpoint

KV_PARAMETERS = "kv_params.safetensors"


@dataclass(frozen=True)
class UnpackResult:
    """What was written."""

    out: Path
    kind: str  # awq or hf
    elapsed_s: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "kind": self.kind,
            "elapsed_s": self.elapsed_s,
            "notes": list(self.notes),
        }


def unpack_workspace(
    source: WorkspaceCheckpoint,
    out: Path,
    *,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UnpackResult:
    """Write the checkpoint, one shard a block; resumes an unfinished one.

    Raises InputError for a damaged workspace or an occupied folder, ResourceError on a full disk.
    """
    start = time.perf_counter()
    check_output_place(out, source.path)
    check_free_space(out, sum(source.expected_files().values()), "unpacking")
    kind = "hf" if source.config.quantization is None else "awq"
    fingerprint = {"command": "unpack", "source": source.digest(), "torch": torch.__version__}
    with OutputFolder.begin(out, fingerprint, restart=restart) as folder:
        if not folder.finished:
            writer = UnpackWriter(folder, source)
            for index in range(source.config.num_layers):
                if not writer.has_block(index):
                    writer.write_stored(index)
                progress(index + 1, source.config.num_layers)
            writer.finish_files()
            if (source.path / KV_PARAMETERS).is_file():
                folder.copy(source.path / KV_PARAMETERS, f"tmq/{KV_PARAMETERS}")
            bits = 16 if source.config.quantization is None else source.config.quantization.bits
            folder.finish(
                {**fingerprint, "kind": kind, "bits": bits}, {"elapsed_s": time.perf_counter() - start}
            )
    return UnpackResult(out, kind, time.perf_counter() - start, tuple(source.notes))


class UnpackWriter(AwqWriter):
    """Writes the blocks of a workspace; floats keep the workspace's own type."""

    def __init__(self, out: OutputFolder, source: WorkspaceCheckpoint) -> None:
        super().__init__(out, source, source.config.quantization or QuantFormat(16, 0))

    def write_stored(self, index: int) -> None:
        """Store one block as the workspace holds it: codes are never unpacked."""
        linears = self.source.stored_linears(index, linear_shapes(self.config))
        linears["o"] = without_zero_bias(linears["o"], index, self.config)
        self.out.save_tensors(
            self.shard_name(index), self.named_tensors(index, linears, self.source.norms(index))
        )

    def store_floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def config_document(self) -> dict[str, Any]:
        """config.json of the model that was packed, or one made from what the workspace states."""
        if (self.source.tokenizer_dir / "config.json").is_file():
            if self.config.quantization is not None:
                return super().config_document()
            document = updated_config(read_object(self.source.tokenizer_dir / "config.json"), self.config)
        else:
            document = made_config(self.config)
        document.pop("torch_dtype", None)
        document["dtype"] = self.config.dtype
        if self.config.quantization is not None:
            document["quantization_config"] = self.quantization_document()
        return document


def made_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json from our own configuration."""
    family = BY_NAME[config.family]
    document: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    dense = ("num_experts", "experts_per_token")
    for field, key in FIELDS.items():
        if field in dense and not config.num_experts:
            continue
        document[family.keys.get(field, key)] = getattr(config, field)
    if family.intermediate_halved:
        document["intermediate_size"] = 2 * config.intermediate_size
    for flag, value in ((family.qkv_bias, config.qkv_bias), (family.o_bias, config.o_bias)):
        if isinstance(flag, str):
            document[flag] = value
    if family.window != "none":
        document["sliding_window"] = None  # TurboMind has no window
    scaling = config.rope_scaling
    if family.name == "qwen":
        document |= {
            "use_logn_attn": config.logn_attention,
            "use_dynamic_ntk": scaling is not None,
            "no_bias": True,
        }
        if scaling is not None:
            document |= {
                "seq_length": scaling.original_max_position,
                "max_position_embeddings": config.max_position,
            }
    elif scaling is not None:
        named = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            named["original_max_position_embeddings"] = scaling.original_max_position
        if scaling.kind == "llama3":
            named |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        if scaling.kind == "yarn":
            named |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                named["attention_factor"] = scaling.attention_factor
        document["rope_scaling"] = named
    return document


def without_zero_bias(o: Stored, index: int, config: ModelConfig) -> Stored:
    """TurboMind stores a bias for o wherever q, k, v have one: zeros, which the family's own names have no place for."""
    if "bias" not in o or BY_NAME[config.family].o_bias is not False:
        return o
    if bool(o["bias"].any()):
        raise InputError(
            f"block {index}: o has a bias that is not zero, which a {show(config.family)} model has no name for."
        )
    return {name: part for name, part in o.items() if name != "bias"}
