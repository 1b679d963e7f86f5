"""Write the seeds of the corpus: for each target a few small inputs that are sound, from which a fuzzer starts.

usage: python scripts/fuzz/seeds.py
"""

import io
import json
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from targets import LLAMA, RUN, TARGETS, _tokenizer, call, remove_place  # noqa: E402

from convert.folder.files import json_bytes, safetensors_chunks  # noqa: E402
from convert.hf.config import parse_config  # noqa: E402
from convert.turbomind.config import Shape, config_yaml  # noqa: E402
from convert.turbomind.ini import config_ini  # noqa: E402


def small_safetensors() -> bytes:
    tensors = {"a": torch.ones(2, 3), "b.c": torch.zeros(4, dtype=torch.float16), "d": torch.zeros(0, 2)}
    return b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors))


def kv_file() -> bytes:
    names = [f"layers.0.{part}.{value}" for part in "kv" for value in ("scale", "zero")]
    return b"".join(bytes(chunk) for chunk in safetensors_chunks({name: torch.ones(1) for name in names}))


def configs() -> list[dict]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
    return [
        LLAMA,
        LLAMA | {"rope_scaling": yarn, "head_dim": 8, "attention_bias": False, "eos_token_id": [1, 2]},
        LLAMA
        | {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 4,
        },
        LLAMA
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        LLAMA
        | {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": 16,
                "zero_point": True,
            }
        },
        {
            "architectures": ["QWenLMHeadModel"],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
        }
        | {"num_attention_heads": 2, "vocab_size": 8, "seq_length": 64, "use_dynamic_ntk": True},
    ]


def workspace_texts() -> tuple[bytes, bytes]:
    config = parse_config(LLAMA)[0]
    shape = Shape(1, 0, "float16", 16, 1, False)
    return config_yaml(config, shape, "llama", "base").encode(), config_ini(config, shape, "base").encode()


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_file() -> bytes:
    """A Llama of one block with hidden size 8 and a tokenizer of three tokens, by hand."""

    def pair(key: str, kind: int, raw: bytes) -> bytes:
        return _text(key) + struct.pack("<I", kind) + raw

    def array(kind: int, items: list[bytes]) -> bytes:
        return struct.pack("<IQ", kind, len(items)) + b"".join(items)

    numbers = {"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    tokens = ["a", "b", "ab"]
    pairs = [pair("general.architecture", 8, _text("llama"))]
    pairs += [pair(f"llama.{key}", 4, struct.pack("<I", value)) for key, value in numbers.items()]
    pairs += [
        pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        pair("tokenizer.ggml.model", 8, _text("gpt2")),
        pair("tokenizer.ggml.pre", 8, _text("gpt-2")),
        pair("tokenizer.ggml.tokens", 9, array(8, [_text(token) for token in tokens])),
        pair("tokenizer.ggml.token_type", 9, array(5, [struct.pack("<i", 1)] * 3)),
        pair("tokenizer.ggml.merges", 9, array(8, [_text("a b")])),
        pair("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 2)),
    ]
    shapes = {"token_embd": (8, 3), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {f"blk.0.{n}": (8, 8) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{n}": (8, 4) for n in ("attn_k", "attn_v")}
    header, data = [], b""
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        extents = struct.pack(f"<{len(shape)}Q", *shape)
        header.append(
            _text(name + ".weight")
            + struct.pack("<I", len(shape))
            + extents
            + struct.pack("<IQ", 1, len(data))
        )
        raw = struct.pack("<e", 0.5) * count
        data += raw + b"\0" * (-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs)) + b"".join(pairs + header)
    return head + b"\0" * (-len(head) % 32) + data


def sentencepiece_file() -> bytes:
    """A BPE model of eight pieces, in protobuf by hand."""

    def field(number: int, raw: bytes) -> bytes:
        return bytes([number << 3 | 2, len(raw)]) + raw

    def piece(text: str, kind: int, score: float) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))

    pieces = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("\u2581", 1),
        ("a", 1),
        ("b", 1),
        ("ab", 1),
        ("<0x41>", 6),
    ]
    body = b"".join(piece(text, kind, -float(i)) for i, (text, kind) in enumerate(pieces))
    return body + field(2, bytes([3 << 3, 2])) + field(3, bytes([3 << 3, 1]))


def parquet_file(value: list) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": value}), stream)
    return stream.getvalue()


def tiktoken_file() -> bytes:
    import base64

    ranks = [bytes([byte]) for byte in range(256)] + [b"ab"]
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks))


def seeds() -> dict[str, list[bytes]]:
    """Target -> sound inputs."""
    yaml_text, ini_text = workspace_texts()
    entry = {
        "path": "a.bin",
        "state": "done",
        "bytes": 1,
        "sha256": "0" * 64,
        "tensors": {"w": ["float16", [1]]},
    }
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    call_record = {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}
        ]
    }
    lines = [
        {"text": "some words"},
        chat,
        call_record,
        "plain",
        {"conversations": [{"from": "human", "value": "x"}]},
    ]
    document = {"format": 1, "tool": RUN["tool"], "kind": "awq", "files": [entry], "has_report": False}
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "<s>"},
        "add_bos_token": True,
        "chat_template": "{{ 1 }}",
    }
    settings["added_tokens_decoder"] = {"258": {"content": "<x>", "special": True}}
    return {
        "safetensors": [small_safetensors()],
        "index": [json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}).encode()],
        "config": [json.dumps(raw).encode() for raw in configs()],
        "checkpoint": [json.dumps(raw).encode() for raw in configs()[:2]],
        "tokenizer_json": [json.dumps(_tokenizer(), ensure_ascii=False).encode()],
        "tokenizer_config": [json.dumps(settings).encode(), b'{"<y>": 258}'],
        "sentencepiece": [sentencepiece_file()],
        "tiktoken": [tiktoken_file()],
        "gguf": [gguf_file()],
        "yaml": [yaml_text],
        "ini": [ini_text],
        "manifest": [json_bytes(document)],
        "run": [json_bytes(RUN)],
        "journal": [
            json.dumps(entry).encode() + b"\n" + json.dumps({"path": "b", "state": "begun"}).encode() + b"\n"
        ],
        "kv_params": [kv_file()],
        "jsonl": ["\n".join(json.dumps(line) for line in lines).encode()],
        "json_text": [json.dumps(lines).encode()],
        "parquet": [parquet_file(["a few words"] * 3)],
    }


def main() -> int:
    for name, inputs in seeds().items():
        folder = HERE / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(data)
            print(f"{name}: {len(data)} bytes, {'taken' if call(name, data) else 'refused'}")
    missing = set(TARGETS) - set(seeds())
    remove_place()
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
