"""turbomind-quant as a Python library: language models to 4 bits, and what it cost.

    import turbomind_quant as tmq

    tmq.quantize("my-model", "my-model-4bit")
    print(tmq.perplexity("my-model", "my-model-4bit").rows[1].result.ppl)
    print(tmq.LLM("my-model-4bit").chat("Name three rivers."))

Every function that takes long has `progress`, a function that is called with each `ProgressEvent`; left out, it is silent. Errors are
`TmqError` and its subclasses. Importing this module is quick: each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convert.errors import InputError, InterruptedRunError, ResourceError, TmqError, UsageError

if TYPE_CHECKING:
    from convert.inspect import InspectReport
    from convert.turbomind.unpack import UnpackResult
    from convert.turbomind.writer import PackResult
    from convert.verify import VerifyReport
    from quant.progress import ProgressEvent
    from quant.recipes import Recipe
    from turbomind_quant.api.evaluation import TableReport, report, table
    from turbomind_quant.api.formats import PackEstimate, estimate_pack, inspect, pack, unpack, verify
    from turbomind_quant.api.llm import LLM, Answer
    from turbomind_quant.api.perplexity import CompareReport, PerplexityReport, compare, perplexity
    from turbomind_quant.api.quantization import calibrate, estimate, quantize
    from turbomind_quant.api.results import CalibrateResult, EstimateResult, QuantizeResult
    from turbomind_quant.api.speed import ThroughputReport, throughput

_HOMES = {
    "convert.inspect": ("InspectReport",),
    "convert.turbomind.unpack": ("UnpackResult",),
    "convert.turbomind.writer": ("PackResult",),
    "convert.verify": ("VerifyReport",),
    "quant.progress": ("ProgressEvent",),
    "quant.recipes": ("Recipe",),
    "turbomind_quant.api.evaluation": ("TableReport", "report", "table"),
    "turbomind_quant.api.formats": ("PackEstimate", "estimate_pack", "inspect", "pack", "unpack", "verify"),
    "turbomind_quant.api.llm": ("LLM", "Answer"),
    "turbomind_quant.api.perplexity": ("CompareReport", "PerplexityReport", "compare", "perplexity"),
    "turbomind_quant.api.quantization": ("calibrate", "estimate", "quantize"),
    "turbomind_quant.api.results": ("CalibrateResult", "EstimateResult", "QuantizeResult"),
    "turbomind_quant.api.speed": ("ThroughputReport", "throughput"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Answer",
    "CalibrateResult",
    "CompareReport",
    "EstimateResult",
    "InputError",
    "InspectReport",
    "InterruptedRunError",
    "PackEstimate",
    "PackResult",
    "PerplexityReport",
    "ProgressEvent",
    "QuantizeResult",
    "Recipe",
    "ResourceError",
    "TableReport",
    "ThroughputReport",
    "TmqError",
    "UnpackResult",
    "UsageError",
    "VerifyReport",
    "calibrate",
    "compare",
    "estimate",
    "estimate_pack",
    "inspect",
    "pack",
    "perplexity",
    "quantize",
    "report",
    "table",
    "throughput",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load the module of a name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
