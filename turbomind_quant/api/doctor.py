"""`tmq doctor`: is this machine fit for the program? Each finding says what was found and what to do about it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from quant.memory import GIB, memory_limit_bytes

_FLOORS = {"torch": "2.10", "transformers": "5.5", "triton": "3.6", "safetensors": "0.5", "click": "8.1"}
_EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus-client", "httpx", "prompt_toolkit"),
    "web": ("gradio",),
    "report": ("jinja2", "matplotlib"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the check. `advice` is empty where there is nothing to do."""

    subject: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """All findings, quick ones first. `folder` is where output would go."""
    yield _python()
    yield from _versions()
    yield _kernels_clash()
    yield from _extras()
    yield from _devices()
    yield _memory()
    yield _disk(folder)
    yield _triton_cache()
    yield _file_limit()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    digits = [part for part in version.split("+")[0].split(".")[:3] if part.isdigit()]
    return tuple(int(part) for part in digits)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.flags.optimize:
        return Finding(
            "python", "warning", f"{found}, with -O", "Run without -O: checks of our own are switched off."
        )
    return Finding("python", "ok", found)


def _versions() -> Iterator[Finding]:
    for package, floor in _FLOORS.items():
        found = _version(package)
        if found is None and package == "triton":
            yield Finding(
                "triton", "warning", "absent", "Without it only the CPU path works: pip install triton."
            )
        elif found is None:
            yield Finding(package, "problem", "absent", f"pip install '{package}>={floor}'")
        elif _numbers(found) < _numbers(floor):
            yield Finding(
                package, "problem", f"{found}, below {floor}", f"pip install -U '{package}>={floor}'"
            )
        else:
            yield Finding(package, "ok", found)


def _kernels_clash() -> Finding:
    ours = Path(__file__).resolve().parents[2] / "kernels"
    spec = util.find_spec("kernels")
    origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
    other = _version("kernels")
    explained = (
        "The PyPI package 'kernels' (Hugging Face's hub kernels) has the import name of a package of ours. "
        "Only one can be imported: pip uninstall kernels, or use an environment of its own for turbomind-quant."
    )
    if origin != ours:
        return Finding(
            "import name kernels", "problem", f"leads to {origin or 'nothing'}, not to {ours}", explained
        )
    if other is not None:
        return Finding(
            "import name kernels",
            "warning",
            f"ours, but the PyPI package {other} is installed too",
            explained,
        )
    return Finding("import name kernels", "ok", "ours alone")


def _extras() -> Iterator[Finding]:
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        if missing:
            yield Finding(
                f"extra [{extra}]",
                "warning",
                f"{', '.join(missing)} absent",
                f"pip install 'turbomind-quant[{extra}]'",
            )
        else:
            yield Finding(f"extra [{extra}]", "ok", "complete")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as e:
        yield Finding("devices", "problem", f"torch cannot be imported: {e}", "Reinstall torch.")
        return
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is built without CUDA"
        )
        yield Finding(
            "gpu",
            "warning",
            f"none ({built})",
            "Everything works on the CPU, slowly; large models want a GPU.",
        )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        if (properties.major, properties.minor) < (8, 0):
            yield Finding(
                f"gpu {index}", "warning", found, "The kernels are written for capability 8.0 and above."
            )
        elif free < total / 2:
            yield Finding(
                f"gpu {index}", "warning", found, "Another program holds most of its memory: see nvidia-smi."
            )
        else:
            yield Finding(f"gpu {index}", "ok", found)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = memory_limit_bytes() or total
    found = f"{usable / GIB:.1f} GiB" + (" (limit of this container)" if usable < total else "")
    if usable < 4 * GIB:
        return Finding("memory", "warning", found, "A 7B model needs about 16 GiB; small models fit.")
    return Finding("memory", "ok", found)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "warning", f"{found}, not writable", "Give output folders elsewhere with -o.")
    if free < 5 * GIB:
        return Finding(
            "disk", "warning", found, "A 7B model in int4 takes about 4 GiB, its workspace as much again."
        )
    return Finding("disk", "ok", found)


def _triton_cache() -> Finding:
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    place = next(p for p in (cache, *cache.parents) if p.exists())
    if os.access(place, os.W_OK):
        return Finding("triton cache", "ok", str(cache))
    return Finding(
        "triton cache", "warning", f"{cache} is not writable", "Set TRITON_CACHE_DIR to a folder that is."
    )


def _file_limit() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1024:
        return Finding(
            "open files",
            "warning",
            f"at most {hard}",
            "The server takes one per connection: ulimit -Hn 8192.",
        )
    return Finding("open files", "ok", f"{soft}, up to {'any number' if hard < 0 else hard}")
