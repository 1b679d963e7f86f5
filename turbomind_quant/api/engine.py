"""The engine that flags or keywords ask for, under the names that LMDeploy uses for them. Imports no torch."""

from convert.errors import UsageError
from engine.config import Dtype, EngineConfig


def engine_config(
    *,
    device: str = EngineConfig.device,
    dtype: Dtype = EngineConfig.dtype,
    tp: int = EngineConfig.tp,
    session_len: int | None = None,
    cache_max_entry_count: float = EngineConfig.cache_fraction,
    quant_policy: int = 0,
    instance_num: int = 1,
    is_quiet: bool = False,
) -> EngineConfig:
    """The settings of an engine.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto", "float16", "bfloat16" or "float32". tp: GPUs to split over.
        session_len: context in tokens; None: the model's. cache_max_entry_count: share of the memory left after the weights that the
            KV cache takes. quant_policy: 8 keeps keys and values in int8, 0 in the model's type.
        instance_num: sequences that run at once. is_quiet: the engine writes warnings alone to stderr, no notes.

    Raises UsageError for a value that is none of the choices.
    """
    if quant_policy not in (0, 8):
        raise UsageError(
            f"--quant-policy {quant_policy} is not done: 8 keeps keys and values in int8, 0 in the model's own type."
        )
    try:
        return EngineConfig(
            device=device,
            dtype=dtype,
            kv_bits=8 if quant_policy == 8 else 16,
            cache_fraction=cache_max_entry_count,
            context_length=session_len,
            max_batch=instance_num,
            max_step_tokens=max(EngineConfig.max_step_tokens, instance_num),
            tp=tp,
            log_level="warning" if is_quiet else "info",
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
