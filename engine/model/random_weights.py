"""Models of a given shape with random weights, made on the device: for speed and memory where no checkpoint is at hand.

Their text means nothing, and every name and note says "random". N out features, K in features.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import ModelConfig, QuantFormat
from convert.errors import UsageError
from convert.families.table import bias_roles, linear_shapes, norm_shapes, stays_float, vector_shapes
from convert.folder.json_files import read_object
from convert.hf.config import parse_config
from kernels.int4 import Quantized

CODE_SPREAD = 4.61  # standard deviation of a code drawn from 0..15


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int = 32000
) -> ModelConfig:
    return ModelConfig(
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_position=32768,
        eos_token_ids=(2,),
    )


SHAPES = {  # Llama 2's, with room for 32K tokens
    "7b": _llama(4096, 11008, 32, 32, 32),
    "13b": _llama(5120, 13824, 40, 40, 40),
    "70b": _llama(8192, 28672, 80, 64, 8),
    "tiny": _llama(256, 512, 2, 4, 2, vocab=1000),
}


def shape_named(name: str) -> ModelConfig:
    """The shape called `name`, or that of a config.json at this path. Raises UsageError where it is neither."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"--random-weights {name}: expected {', '.join(SHAPES)} or the path of a config.json."
        )
    config, _, _ = parse_config(read_object(path))
    return replace(config, quantization=None)


@dataclass
class RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn when they are asked for; a tensor's values depend on seed and place only."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    seed: int = 0

    def block(self, index: int) -> BlockWeights:
        generator = self._generator(index + 1)
        config = self.config.of_layer(index)
        biased = bias_roles(config)
        linears = {}
        for role, (rows, cols) in linear_shapes(config).items():
            bias = self._normal(generator, 0.02, rows) if role.rsplit(".", 1)[-1] in biased else None
            if config.quantization is None or stays_float(role):
                linears[role] = LinearWeights(self._normal(generator, cols**-0.5, rows, cols), bias)
            else:
                group = config.quantization.group_size
                linears[role] = LinearWeights(self._quantized(generator, rows, cols, group), bias)
        norms = {
            role: torch.ones(shape, dtype=self.dtype, device=self.device)
            for role, shape in norm_shapes(config).items()
        }
        vectors = {
            role: torch.zeros(shape, dtype=torch.float32, device=self.device)
            for role, shape in vector_shapes(config).items()
        }
        return BlockWeights(index, linears, norms, vectors, config.norm_offset)

    def embedding(self) -> Tensor:
        return self._normal(self._generator(0), 1.0, self.config.vocab_size, self.config.hidden_size)

    def final_norm(self) -> Tensor:
        return torch.ones(self.config.hidden_size, dtype=self.dtype, device=self.device)

    def lm_head(self) -> Tensor:
        if self.config.tie_embeddings:
            return self.embedding()
        rows, cols = self.config.vocab_size, self.config.hidden_size
        return self._normal(self._generator(self.config.num_layers + 1), cols**-0.5, rows, cols)

    def weight_files(self) -> list[Path]:
        return []

    @property
    def dtype(self) -> torch.dtype:
        on_gpu = self.device.type == "cuda"
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(
            self.config.dtype, torch.float16 if on_gpu else torch.float32
        )

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 1000 + place)

    def _normal(self, generator: torch.Generator, deviation: float, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return out.normal_(0.0, deviation, generator=generator)

    def _quantized(self, generator: torch.Generator, rows: int, cols: int, group: int) -> Quantized:
        """Codes 0..15 with zero points near 8, so that the weights have mean about 0 and deviation K^-0.5."""
        groups = cols // group
        codes = torch.randint(16, (rows, cols), dtype=torch.uint8, device=self.device, generator=generator)
        zeros = torch.randint(
            7, 9, (rows, groups), dtype=torch.uint8, device=self.device, generator=generator
        )
        scales = torch.empty(rows, groups, dtype=torch.float32, device=self.device)
        scales.uniform_(0.8, 1.2, generator=generator).mul_(cols**-0.5 / CODE_SPREAD)
        return Quantized(codes, scales.half(), zeros, group)


def random_checkpoint(
    name: str,
    device: torch.device,
    *,
    weights: str = "fp16",
    group_size: int = 128,
    seed: int = 0,
) -> RandomCheckpoint:
    """A random model of the shape `name`; weights "fp16" (the shape's float dtype) or "int4".

    Raises UsageError for an unknown shape or weights, or where group_size does not divide every K.
    """
    config = shape_named(name)
    if weights not in ("fp16", "int4"):
        raise UsageError(f"weights {weights!r}: random models are made in fp16 or int4.")
    if weights == "int4":
        layers = (config.of_layer(index) for index in range(config.num_layers))
        ragged = sorted(
            {
                role
                for layer in layers
                for role, (_, cols) in linear_shapes(layer).items()
                if cols % group_size
            }
        )
        if ragged:
            raise UsageError(
                f"group size {group_size} does not divide the input of {', '.join(ragged)} in shape {name}: choose a divisor."
            )
        config = replace(config, quantization=QuantFormat(4, group_size))
    label = f"random-{Path(name).stem}-{weights}"
    note = f"{label}: weights are random numbers, for speed and memory only; its text means nothing."
    path = Path(label)
    return RandomCheckpoint(path, "hf", config, path, [note], device=device, seed=seed)
