"""The scripts behind further models: a trained one loads and has learned, planted outliers and rotations change no output."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert.readers import open_checkpoint
from engine.model.attention import causal_attend
from engine.model.forward import Model
from kernels.int4 import quantize
from scripts.plant_outliers import main as plant_main
from scripts.plant_outliers import plant
from scripts.rotate_model import main as rotate_main
from scripts.train_model import init_embedding, init_pruned, pruned_shape, rate, split_text
from scripts.train_model import main as train_main
from tests.tiny_runs import write_runnable

TEXT = "".join(
    f"the {word} number {i} is {'even' if i % 2 == 0 else 'odd'}.\n"
    for i, word in enumerate(["cat", "dog"] * 300)
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_runnable(folder / "tokenizer")
    (folder / "text.txt").write_text(TEXT)
    shape = "--hidden 128 --inner 256 --layers 2 --heads 4 --kv-heads 2 --length 32 --batch 8 --device cpu"
    run = f"--steps 40 --rate 3e-3 --hold 0.25 {shape}"
    train_main(
        [str(folder / "tokenizer"), str(folder / "out"), "--text", str(folder / "text.txt"), *run.split()]
    )
    return folder / "out"


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = Model.from_checkpoint(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), causal_attend(1, len(ids), model.config))


def test_a_trained_model_loads_and_has_learned(trained: Path) -> None:
    from convert.tokenizer.tokenizer import load_tokenizer

    held = (trained / "held" / "text.txt").read_text()
    assert TEXT.endswith(held) and len(held) >= 0.25 * len(TEXT)
    ids = torch.tensor(list(load_tokenizer(trained).encode_plain(held)))[:64]
    logits = logits_of(trained, ids)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert float(loss) < 0.8 * float(torch.log(torch.tensor(float(logits.shape[1]))))  # below guessing evenly


def test_planted_outliers_change_no_output_but_what_rounding_makes_of_it(
    trained: Path, tmp_path: Path
) -> None:
    plant_main([str(trained), str(tmp_path / "planted"), "--channels", "6", "--factor", "32"])
    ids = torch.arange(40)
    assert torch.equal(logits_of(trained, ids), logits_of(tmp_path / "planted", ids))
    before, after = (
        load_file(trained / "model.safetensors"),
        load_file(tmp_path / "planted" / "model.safetensors"),
    )
    name, norm = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.post_attention_layernorm.weight"
    assert int((after[norm] != before[norm]).sum()) == 6

    def error(tensors: dict[str, torch.Tensor]) -> float:
        delta = quantize(tensors[name], 4, 64).dequantize() - tensors[name]
        return float((delta * tensors[norm]).pow(2).sum())

    assert error(after) > 1.5 * error(before)


def test_what_would_not_be_exact_is_refused() -> None:
    tensors = {"a.input_layernorm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match="power of two"):
        plant(tensors, 1, 3.0, 0)
    with pytest.raises(ValueError, match=r"a\.self_attn\.q_proj\.weight is missing"):
        plant(tensors, 1, 2.0, 0)


def test_text_is_split_at_a_line_and_the_rate_rises_and_falls() -> None:
    assert split_text("aa\nbb\ncc\ndd\n", 0.5) == ("aa\nbb\n", "cc\ndd\n")
    assert rate(0.0) == 0 and rate(0.05) == pytest.approx(1.0) and rate(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("what", [["--heads"], ["--residual"], ["--heads", "--residual"]])
def test_rotations_change_no_output_but_every_weight_they_name(
    trained: Path, tmp_path: Path, what: list[str]
) -> None:
    rotate_main([str(trained), str(tmp_path / "rotated"), *what])
    ids = torch.arange(40)
    torch.testing.assert_close(
        logits_of(tmp_path / "rotated", ids), logits_of(trained, ids), atol=3e-4, rtol=1e-3
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "rotated"))
    moved = {name.rsplit(".", 2)[-2] for name in before if not torch.allclose(before[name], after[name])}
    both = {"v_proj", "o_proj"}
    stream = {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert moved - norms == (both | stream if "--residual" in what else both)
    assert "lm_head.weight" not in before and ("lm_head.weight" in after) == ("--residual" in what)


def test_nothing_to_rotate_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rotate_main([str(trained), str(tmp_path / "rotated")])
    assert "nothing to rotate" in capsys.readouterr().err


def test_a_student_starts_from_the_widest_directions_of_its_teachers_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, wide, teacher = (torch.randn(50, width, generator=generator) for width in (3, 8, 5))
    teacher[:, 2] *= 20
    before = wide.clone()
    init_embedding(narrow, teacher)
    init_embedding(wide, teacher)
    torch.testing.assert_close(wide[:, :5] @ wide[:, :5].t(), teacher @ teacher.t(), rtol=1e-4, atol=1e-3)
    assert torch.equal(wide[:, 5:], before[:, 5:])
    torch.testing.assert_close(narrow[:, 0].abs(), teacher[:, 2].abs(), rtol=0.1, atol=2)


def test_rotating_in_place_and_other_families_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rotate_main([str(trained), str(trained), "--heads"])
    assert "another folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(SystemExit):
        rotate_main([str(tmp_path), str(tmp_path / "out"), "--heads"])
    assert "type gemma" in capsys.readouterr().err


def test_a_teacher_is_where_training_starts(trained: Path, tmp_path: Path) -> None:
    """One step at a rate of nearly nothing leaves the embedding where it began."""
    (tmp_path / "text.txt").write_text(TEXT)
    shape = "--hidden 128 --inner 256 --layers 1 --heads 4 --kv-heads 2 --length 16 --batch 2 --device cpu"
    run = f"--teacher {trained} --steps 1 --rate 1e-9 --hold 0.25 {shape}"
    train_main([str(trained), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), *run.split()])
    ours, theirs = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        for folder in (tmp_path / "out", trained)
    )
    torch.testing.assert_close(ours @ ours.t(), theirs @ theirs.t(), rtol=0.02, atol=0.02)


def llama(hidden: int, layers: int, kv_heads: int, inner: int, eps: float) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "head_dim": 16}
    heads = {"num_attention_heads": 3 * kv_heads, "num_key_value_heads": kv_heads}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, rms_norm_eps=eps, tie_word_embeddings=True, **shape, **heads)
    )


def test_a_pruned_student_of_all_layers_is_its_teacher_in_a_wider_form() -> None:
    teacher, student = llama(48, 2, 1, 40, 1e-5), llama(96, 2, 2, 64, 1e-5 / 2)
    for parameter in student.parameters():
        parameter.data.zero_()  # only what was written counts
    init_pruned(student, teacher, [0, 1])
    ids = torch.arange(20)[None]
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits)


def test_a_pruned_student_keeps_layers_of_its_teacher(trained: Path, tmp_path: Path) -> None:
    """One step at a rate of nearly nothing: of two layers the first is left, in the teacher's sizes, as it was in bfloat16."""
    (tmp_path / "text.txt").write_text(TEXT)
    run = f"--teacher {trained} --prune --length 16 --batch 2 --device cpu --steps 1 --rate 1e-9 --hold 0.25"
    command = [str(trained), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), *run.split()]
    train_main([*command, "--layers", "1"])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained))
    assert set(ours) == {name for name in theirs if ".layers.1." not in name}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name].bfloat16().float(), atol=1e-7, rtol=0)
    with pytest.raises(SystemExit, match="the teacher has 2"):
        train_main([*command, "--layers", "3"])


def test_a_pruned_student_takes_whole_groups_of_heads_and_layers_from_first_to_last(tmp_path: Path) -> None:
    """9 query heads of 64 on 3: the fourth group makes 768; eps falls as the mean square does."""
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1500,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    rest = {"num_hidden_layers": 30, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **rest}))
    args = argparse.Namespace(teacher=tmp_path, layers=4)
    pruned_shape(args)
    assert (args.hidden, args.heads, args.kv_heads, args.inner) == (768, 12, 4, 1536)
    assert args.kept == [0, 10, 19, 29] and args.rope_theta == 1e5
    assert args.norm_eps == pytest.approx(0.75e-5)
