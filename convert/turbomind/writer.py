"""Writes a TurboMind workspace from a float or AWQ checkpoint: pre-flight, weight files, config, tokenizer, manifest.

Streams linear by linear with a few threads; memory is bounded by that many linears and the embedding. Needs no GPU and no LMDeploy.
"""

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convert import kv_parameters
from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import BY_NAME, linear_modules, linear_shapes
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place, worker_count
from convert.folder.json_files import show
from convert.folder.output import OutputFolder
from convert.folder.source_files import SourceFiles
from convert.formats import Dialect
from convert.hf.tensor_folder import INDEX_NAME
from convert.tokenizer.files import read_chat_template
from convert.tokenizer.tokenizer import check_tokenizer
from convert.turbomind.config import CHAT_TEMPLATES, Shape, chat_template_name, config_yaml
from convert.turbomind.packing import GROUP_SIZE, Packing, WeightType, legal_tp, misfits
from convert.turbomind.shapes import block_shapes, embedding_shapes, norm_shape, output_shapes
from convert.turbomind.tensors import Files, block_files, outer_files

WEIGHTS = "triton_models/weights"
TOKENIZER = "triton_models/tokenizer"
# an index of shards at the root makes LMDeploy 0.18 look for the shards
NOT_COPIED = ("run.json", "manifest.json", "report.json", INDEX_NAME)
TOKENIZER_FILES = ("tokenizer.model", "qwen.tiktoken", "merges.txt")
PACKED_FAMILIES = {
    "0.6.5": ("llama", "mistral", "qwen2", "internlm", "internlm2", "qwen", "mixtral"),
    "0.1": ("llama", "internlm", "internlm2", "qwen"),
}


@dataclass(frozen=True)
class PackResult:
    """What was written. Rates are over the whole time, reading and hashing included."""

    out: Path
    files: int
    weight_bytes: int
    elapsed_s: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "files": self.files,
            "weight_bytes": self.weight_bytes,
            "elapsed_s": self.elapsed_s,
            "gb_per_s": self.weight_bytes / self.elapsed_s / 1e9,
            "notes": list(self.notes),
        }


def plan_packing(source: Checkpoint, tp: int, dialect: Dialect, dtype: str | None = None) -> Packing:
    """The packing of a checkpoint, or InputError that says what does not fit and which tp values do.

    Args:
        dtype: float16 or bfloat16 for float checkpoints; None follows the source (float32 becomes float16).
    """
    config = source.config
    if config.family not in PACKED_FAMILIES[dialect]:
        known = ", ".join(PACKED_FAMILIES[dialect])
        raise InputError(
            f"{show(str(source.path))} is a {config.family} model, which TurboMind's dialect {dialect} does not read: "
            f"expected one of {known}. LMDeploy and vLLM of today load the AWQ checkpoint itself."
        )
    packing = Packing(config, tp, _weight_type(source, dtype), dialect)
    reasons = misfits(packing)
    if reasons:
        legal = legal_tp(config, packing.weight_type, dialect)
        cure = f"tp may be {', '.join(map(str, legal))}" if legal else "no tp fits; quantize with --pad"
        raise InputError(
            f"{show(str(source.path))} cannot be packed with tp {tp}: {'; '.join(reasons)}. {cure}."
        )
    return packing


def _weight_type(source: Checkpoint, dtype: str | None) -> WeightType:
    quantization = source.config.quantization
    if quantization is None:
        chosen = dtype or source.config.dtype
        return "bfloat16" if chosen == "bfloat16" else "float16"
    if dtype == "bfloat16":
        raise InputError("int4 weights go with float16 in TurboMind: leave --dtype bfloat16 out.")
    where = show(str(source.path))
    if quantization.bits != 4:
        raise InputError(
            f"{where} has {quantization.bits}-bit codes: TurboMind reads int4 only. Quantize with --bits 4."
        )
    if quantization.group_size != GROUP_SIZE:
        raise InputError(
            f"{where} has groups of {quantization.group_size}: TurboMind's int4 kernels know only {GROUP_SIZE}. "
            "Quantize again with --group-size 128 (and --pad where the model's sizes need it)."
        )
    skipped = skipped_linears(source.config, quantization.modules_to_not_convert)
    if skipped:
        listed = ", ".join(skipped[:4])
        raise InputError(
            f"{where} leaves linears in float ({listed}): TurboMind wants all of them quantized. "
            "Quantize again with --pad instead of --keep-ragged."
        )
    return "int4"


def write_workspace(
    source: Checkpoint,
    out: Path,
    *,
    tp: int = 1,
    dialect: Dialect = "0.6.5",
    dtype: str | None = None,
    chat_template: str | None = None,
    restart: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Write a workspace; resumes an unfinished one of the same settings, file by file.

    Args:
        chat_template: LMDeploy's name of the chat format; None finds it in the checkpoint's own template.
        workers: threads, each of which holds one linear or the embedding at a time; None: two more than cores, at most 8.
        progress: called with (blocks done, blocks in all).

    Raises InputError when the model cannot be packed so or the folder is occupied, ResourceError on a full disk.
    """
    start = time.perf_counter()
    check_output_place(out, source.path)
    packing = plan_packing(source, tp, dialect, dtype)
    check_tokenizer(source.tokenizer_dir)
    chat = chat_template or chat_template_name(read_chat_template(source.tokenizer_dir), source.config.family)
    if chat not in CHAT_TEMPLATES:
        raise InputError(
            f"LMDeploy 0.6.5 has no chat template named {show(chat)}: expected one of {', '.join(sorted(CHAT_TEMPLATES))}."
        )
    check_free_space(out, estimate_bytes(packing), "packing")
    fingerprint = {
        "command": "pack",
        "source": source.digest(),
        "dialect": dialect,
        "tp": tp,
        "weight_type": packing.weight_type,
        "chat_template": chat,
        "torch": torch.__version__,
    }
    with OutputFolder.begin(out, fingerprint, restart=restart, layout="root") as folder:
        if not folder.finished:
            _write_weights(source, packing, folder, workers or worker_count(), progress)
            _write_config(source, packing, folder, chat)
            _copy_tokenizer(source.beside, folder)
            _copy_kv_parameters(source, packing, folder)
            source.check_unchanged()
            facts = {**fingerprint, "kind": "workspace", "bits": 4 if packing.weight_type == "int4" else 16}
            folder.finish(facts, {"elapsed_s": time.perf_counter() - start})
    sizes = [
        path.stat().st_size for path in (out / WEIGHTS).iterdir() if path.suffix not in (".yaml", ".ini")
    ]
    return PackResult(out, len(sizes), sum(sizes), time.perf_counter() - start, tuple(source.notes))


def skipped_linears(config: ModelConfig, not_converted: tuple[str, ...]) -> list[str]:
    """Those of `modules_to_not_convert` that name a linear of a block: head, embedding and router are float anyway."""
    family = BY_NAME[config.family]
    modules = [module for role, module in linear_modules(family, config).items() if role != "router"]
    modules += [fused.module for fused in family.fused]
    paths = [family.block.format(i=0) + module for module in modules]
    return [entry for entry in not_converted if any(entry in path for path in paths)]


def estimate_bytes(packing: Packing) -> int:
    """Bytes of the weight files, from the shapes alone."""
    config = packing.config
    per_weight = 0.5 + 4 / GROUP_SIZE if packing.weight_type == "int4" else 2
    linears = sum(rows * cols for rows, cols in linear_shapes(config).values())
    return int(config.num_layers * linears * per_weight + 4 * config.vocab_size * config.hidden_size)


def _write_weights(
    source: Checkpoint,
    packing: Packing,
    folder: OutputFolder,
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Every weight file, block by block with a few threads; those that an earlier run finished are left as they are."""
    total = packing.config.num_layers
    outer = embedding_shapes(packing) | output_shapes(packing) | norm_shape(packing)

    def write(names: Collection[str], make: Callable[[], Files]) -> None:
        torch.set_num_threads(1)  # of this worker: it shares the cores with the others
        missing = [f"{WEIGHTS}/{name}" for name in names if not folder.has(f"{WEIGHTS}/{name}")]

        def files() -> Files:
            for name, tensor in make():
                if f"{WEIGHTS}/{name}" in missing:
                    yield f"{WEIGHTS}/{name}", tensor
                del tensor  # before the next one is made

        if missing:
            folder.save_raw(missing, files())

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(write, outer, partial(outer_files, source, packing))]
        for index in range(total):
            make = partial(block_files, source, index, packing)
            futures.append(pool.submit(write, block_shapes(packing, index), make))
        try:
            for done, future in enumerate(futures):
                future.result()
                progress(done, total)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _write_config(source: Checkpoint, packing: Packing, folder: OutputFolder, chat: str) -> None:
    shape = Shape(
        tp=packing.tp,
        group_size=packing.group_size,
        weight_type=packing.weight_type,
        intermediate_size=packing.intermediate_size,
        num_kv_heads=packing.config.num_kv_heads * packing.replication,
        attn_bias=packing.attn_bias,
    )
    if packing.dialect == "0.1":
        from convert.turbomind.ini import config_ini

        kv_int8 = (source.path / kv_parameters.IN_CHECKPOINT).is_file()
        text, name = config_ini(packing.config, shape, chat, kv_int8), "config.ini"
    else:
        text, name = config_yaml(packing.config, shape, packing.config.family, chat), "config.yaml"
    folder.write(f"{WEIGHTS}/{name}", text.encode())


def _copy_tokenizer(source: SourceFiles, folder: OutputFolder) -> None:
    """Tokenizer files to triton_models/tokenizer (0.6) and to the root (0.7.1 and later look there)."""
    for name in source.names:
        is_wanted = name in TOKENIZER_FILES or name.endswith((".json", ".py", ".jinja"))
        if is_wanted and name not in NOT_COPIED:
            for target in (f"{TOKENIZER}/{name}", name):
                folder.write_chunks(target, source.contents(name))


def _copy_kv_parameters(source: Checkpoint, packing: Packing, folder: OutputFolder) -> None:
    parameters = source.path / kv_parameters.IN_CHECKPOINT
    if not parameters.is_file():
        return
    folder.copy(parameters, kv_parameters.IN_WORKSPACE)
    if packing.dialect == "0.1":
        from convert.turbomind.ini import kv_scale_files

        files = {f"{WEIGHTS}/{n}": t for n, t in kv_scale_files(parameters, packing.config, packing.tp)}
        folder.save_raw(list(files), files.items())
