"""Language models inside vision-language folders: read and run as transformers runs them on text, all else carried bit for bit."""

import json
from pathlib import Path
from typing import Any

import family_models
import pytest
import torch
import transformers
from family_models import TOLERANCE, logits_of, read
from safetensors.torch import load_file, save_file

import turbomind_quant as tmq
from convert.readers import open_checkpoint

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "rms_norm_eps": 3e-5,
    "tie_word_embeddings": False,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]}}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
QWEN2_VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2VLForConditionalGeneration": (
        "qwen2",
        {"text_config": TEXT | MROPE, "vision_config": QWEN2_VISION},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2",
        {"text_config": TEXT | MROPE, "vision_config": QWEN_VISION},
    ),
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {
            "text_config": TEXT
            | {"sliding_window": 9, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
            "vision_config": SIGLIP | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 260,
        },
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral",
        {
            "text_config": TEXT | {"model_type": "mistral", "sliding_window": 9},
            "vision_config": SIGLIP
            | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
            "tie_word_embeddings": False,
            "image_token_index": 260,
        },
    ),
}
MODELS |= {
    "Qwen3VLForConditionalGeneration": (
        "qwen3",
        {
            "text_config": TEXT | MROPE,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
    "LlavaForConditionalGeneration": (
        "llama",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": SIGLIP | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            "image_token_index": 260,
            "tie_word_embeddings": False,
        },
    ),
}
OLDER = {  # how releases before 4.52 named the parts
    "Qwen": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "Other": (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
}


def write_source(name: str, folder: Path) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name][1], attn_implementation="eager")).eval()
    family_models.randomize(model)
    for part, parameter in model.named_parameters():
        if "vision" in part or "visual" in part:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def with_older_names(source: Path, target: Path, name: str) -> Path:
    """The same model with its tensors named, and its language part of config.json placed, as older releases did."""
    target.mkdir()
    tensors = {}
    for key, tensor in tensors_of(source).items():
        for new, old in OLDER["Qwen" if name.startswith("Qwen") else "Other"]:
            if key.startswith(new):
                key = old + key.removeprefix(new)
                break
        tensors[key] = tensor
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if name.startswith("Qwen"):
        config = {k: v for k, v in config.items() if k != "text_config"} | {
            key: value for key, value in config["text_config"].items() if key != "model_type"
        }
        config["architectures"] = [name]
    (target / "config.json").write_text(json.dumps(config))
    return target


CASES = [
    (name, older) for name in MODELS for older in (False, True) if not (older and name.startswith("Qwen3"))
]


@pytest.mark.parametrize(("name", "older"), CASES)
@torch.no_grad()
def test_the_language_model_is_quantized_and_the_rest_carried_through(
    name: str, older: bool, tmp_path: Path
) -> None:
    reference = write_source(name, tmp_path / "m")
    source = with_older_names(tmp_path / "m", tmp_path / "old", name) if older else tmp_path / "m"
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = reference(input_ids=ids).logits
    assert expected.std() > 0.3
    ours = read(source)
    assert ours.config.family == MODELS[name][0]
    assert (logits_of(ours, ids) - expected).abs().max() < TOLERANCE

    tmq.quantize(source, tmp_path / "q", preset="rtn", group_size=32, device="cpu")
    before, after = tensors_of(source), tensors_of(tmp_path / "q")
    carried = [key for key in before if any(part in key for part in ("vis", "projector"))]
    assert len(carried) > 10 and any(before[key].dtype == torch.bfloat16 for key in carried)
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in carried
    )
    assert sum(key.endswith(".qweight") for key in after) == 2 * 7
    skipped = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    for key in carried:  # by a prefix up to a dot (transformers) and by a part of the name (vLLM)
        assert any(key.startswith(entry + ".") for entry in skipped), key
    manifest = json.loads((tmp_path / "q" / "tmq" / "manifest.json").read_text())
    accounted = manifest["tensors"]
    assert sorted(accounted["carried"]) == sorted(carried)
    assert accounted["quantized"] == 14 and accounted["dropped"] == {}
    assert accounted["quantized"] + accounted["float"] + len(carried) == len(before)
    again = open_checkpoint(tmp_path / "q")
    assert again.config.family == MODELS[name][0] and again.config.tree is not None
    assert tmq.verify(tmp_path / "q", source=source).passed
