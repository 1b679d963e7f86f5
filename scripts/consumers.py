"""One engine of somebody else's loads a folder and computes: `python consumers.py NAME FOLDER IN.json OUT.npz`.

Run by `scripts/check_consumers.py` with the Python of an environment that has the engine; imports nothing of this project.
IN.json: {"prompt": ids, "greedy": count, "windows": [ids, ...]}. OUT.npz: `logits` (L, V) float32 of the prompt (llama.cpp: log-
probabilities of the next token, (1, V)), `greedy` ids, `nll` mean of each window in nats.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Forward = Callable[[list[int]], np.ndarray]  # ids -> logits (L, V) float32


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """(L, V) float64, each row normalised."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def by_forward(forward: Forward, task: dict[str, Any]) -> dict[str, Any]:
    """The three results of an engine that gives the logits of every position."""
    ids = list(task["prompt"])
    logits = forward(ids)
    greedy: list[int] = []
    while len(greedy) < task["greedy"]:
        greedy.append(int(forward(ids + greedy)[-1].argmax()))
    nll = []
    for window in task["windows"]:
        rows = log_probabilities(forward(window)[:-1])
        nll.append(float(-rows[np.arange(len(window) - 1), window[1:]].mean()))
    return {"logits": logits, "greedy": greedy, "nll": nll}


def torch_forward(model: Any) -> Forward:
    """A transformers model as a function of ids."""
    import torch

    model.eval()

    def forward(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            result: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
        return result

    return forward


def compressed_tensors(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """transformers with compressed-tensors, dequantized at load, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    return by_forward(torch_forward(model), task)


def float16(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """transformers on the dequantized float16 checkpoint, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return by_forward(torch_forward(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), task)


def gptqmodel_awq(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """transformers with GPT-QModel's torch kernel for AWQ; it computes in float16."""
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="cpu",
        dtype=torch.float16,
        quantization_config=AwqConfig(backend="torch_awq"),
    )
    return by_forward(torch_forward(model), task)


def gptqmodel_gptq(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """GPT-QModel's torch kernel for GPTQ; it computes in float16."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    return by_forward(torch_forward(model.model), task)


def mlx(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm on a CPU; every float is turned into float32 first."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(folder))
    model.set_dtype(mx.float32)

    def forward(ids: list[int]) -> np.ndarray:
        return np.array(model(mx.array([ids]))[0].astype(mx.float32))

    return by_forward(forward, task)


def llama_cpp(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp through xllamacpp on a CPU: it rounds the inputs of every int4 product to 8 bits, by its own design."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.n_predict = 1024, 1, False, 1
    server = xllamacpp.Server(params)
    words = task["vocab_size"]

    def complete(ids: list[int], count: int, probabilities: int) -> list[dict[str, Any]]:
        request = {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0.0,
            "n_probs": probabilities,
            "cache_prompt": True,
        }
        answer: Any = server.handle_completions(request)
        while isinstance(answer, (str, bytes)):
            answer = json.loads(answer)
        tokens: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
        return tokens

    def next_token(ids: list[int]) -> np.ndarray:
        row = np.full(words, -np.inf)
        for entry in complete(ids, 1, words)[0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    greedy = [token["id"] for token in complete(task["prompt"], task["greedy"], 1)]
    logits = next_token(task["prompt"])[None]
    nll = []
    for window in task["windows"]:
        losses = [-next_token(window[:place])[window[place]] for place in range(1, len(window))]
        nll.append(float(np.mean(losses)))
    return {"logits": logits, "greedy": greedy, "nll": nll}


CONSUMERS = {
    function.__name__: function
    for function in (compressed_tensors, float16, gptqmodel_awq, gptqmodel_gptq, mlx, llama_cpp)
}

if __name__ == "__main__":
    name, folder, task_file, out = sys.argv[1:]
    found = CONSUMERS[name](Path(folder), json.loads(Path(task_file).read_text()))
    np.savez(out, **{key: np.asarray(value) for key, value in found.items()})
