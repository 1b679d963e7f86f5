"""Part `ppl`: the engine and its kernels against a plain pass in torch, in the same dtype, on text that the model wrote itself.

The model of random weights writes B texts through the engine at temperature 1 (paged cache, decode kernels, CUDA graphs), which reports the
log-probability of each token that it drew. The plain pass reads the same texts: dequantized weights, torch's products and attention, int8
keys and values rounded on the spot. Perplexities of both over the written tokens must agree to 0.1 %; so must those of `engine.measure.perplexity`
(prefill kernels) over the whole texts. A text drawn from the model makes the figures sensitive: its perplexity is far below the vocabulary.
"""

import math
from dataclasses import replace

import torch
from throughput_report import Report
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.checkpoint_view import CheckpointView
from engine.api import Request, SamplingParams
from engine.config import EngineConfig
from engine.loading import make_core
from engine.measure.perplexity import perplexity, perplexity_and_reference
from engine.measure.windows import EvalTokens
from engine.model.attention import causal_attend
from engine.model.forward import Model, compute_dtype
from engine.model.kv_simulation import KVSimulation
from engine.model.ops import TORCH_OPS
from engine.model.random_weights import random_checkpoint
from engine.serving.core import EngineCore
from kernels.int4 import Quantized

BAR = 0.001  # relative difference of perplexities


class DequantizedCheckpoint(CheckpointView):
    """Another checkpoint with its int4 weights as floats of `dtype`."""

    def __init__(self, inner: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(inner, config=replace(inner.config, quantization=None))
        self._dtype = dtype

    def block(self, index: int) -> BlockWeights:
        block = self.inner.block(index)
        return replace(block, linears={role: self._dense(part) for role, part in block.linears.items()})

    def _dense(self, part: LinearWeights) -> LinearWeights:
        if not isinstance(part.weight, Quantized):
            return part
        return LinearWeights(part.weight.dequantize(self._dtype), part.bias)


def write_texts(core: EngineCore, count: int, prompt: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts (B, L) int64, of which the model wrote what follows the prompt, and the engine's log-probabilities (B, L - prompt)."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(core.runner.vocab_size, (count, prompt), generator=generator)
    sampling = SamplingParams(max_tokens=length - prompt, temperature=1.0, ignore_eos=True, logprobs=0)
    for i in range(count):
        core.add(Request(str(i), tuple(prompts[i].tolist()), replace(sampling, seed=i)))
    written: dict[int, list[tuple[int, float]]] = {i: [] for i in range(count)}
    while core.has_work:
        for event in core.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            written[int(event.request_id)] += [(p.token_id, p.logprob) for p in event.logprobs]
    tokens = torch.tensor([[token for token, _ in written[i]] for i in range(count)])
    logprobs = torch.tensor([[value for _, value in written[i]] for i in range(count)], dtype=torch.float64)
    return torch.cat([prompts, tokens], dim=1), logprobs


@torch.inference_mode()
def read_texts(model: Model, texts: Tensor, prompt: int, kv: KVSimulation | None) -> Tensor:
    """The plain pass: log-probabilities (B, L - prompt) of the written tokens, text by text."""
    out = []
    for text in texts.to(model.device):
        attend = causal_attend(1, len(text), model.config, kv)
        hidden = model.hidden(text, torch.arange(len(text), device=model.device), attend)
        logprobs = model.head(hidden[prompt - 1 : -1]).log_softmax(-1)
        out.append(logprobs.gather(1, text[prompt:, None])[:, 0].double().cpu())
    return torch.stack(out)


def run_ppl(
    report: Report,
    shape: str = "7b",
    device: torch.device | None = None,
    *,
    texts: int = 16,
    prompt: int = 32,
    length: int = 512,
) -> None:
    """int4 weights with both caches."""
    device = device or torch.device("cuda", 0)
    ckpt = random_checkpoint(shape, device, weights="int4")
    dtype = compute_dtype(ckpt.config, device)
    for kv_bits in (16, 8):
        cache = "int4+KV8" if kv_bits == 8 else "int4"
        config = EngineConfig(
            device=str(device), kv_bits=8 if kv_bits == 8 else 16, max_batch=texts, context_length=length + 64, warm_up=False,
            cache_bytes=None if device.type == "cpu" else 8 * 1024**3,
        )  # fmt: skip
        core = make_core(ckpt, config)
        try:
            written, engine = write_texts(core, texts, prompt, length)
        finally:
            core.close()
        del core
        kv = KVSimulation(8) if kv_bits == 8 else None
        tokens = EvalTokens(written.flatten(), False, "self-written", "", "")
        plain = Model.from_checkpoint(DequantizedCheckpoint(ckpt, dtype), device, dtype, ops=TORCH_OPS)
        expected = read_texts(plain, written, prompt, kv)
        simulated = lambda batch, size, config, kv=kv: causal_attend(batch, size, config, kv)  # noqa: E731
        slow, reference = perplexity_and_reference(
            plain, tokens, length, keep=4, kv=kv, make_attend=simulated
        )
        del plain
        model = Model.from_checkpoint(ckpt, device, dtype)
        fast = perplexity(model, tokens, length, kv=kv, reference=reference)
        del model, reference
        ours, theirs = (math.exp(-float(part.mean())) for part in (engine, expected))
        spread = float((engine - expected).abs().mean())
        report.note(
            f"perplexity of {shape} (random) {cache} on text of its own, {texts} x {length}: engine, decoding {ours:.2f}, plain "
            f"{theirs:.2f}, mean difference a token {spread:.1e} nats; prefill kernels {fast.ppl:.2f} ({fast.kv_path or 'no cache'}), plain "
            f"{slow.ppl:.2f}, KL {fast.kl:.1e}, top-1 {fast.top1:.2%}"
        )
        report.judge(
            f"{cache}: perplexity of decoding over plain, off by", abs(ours / theirs - 1), BAR, at_most=True
        )
        report.judge(
            f"{cache}: perplexity of prefill over plain, off by",
            abs(fast.ppl / slow.ppl - 1),
            BAR,
            at_most=True,
        )
