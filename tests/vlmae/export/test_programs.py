"""Exported programs, called as their model card says, against the model; any batch size."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from exported_models import (
    CLASSES,
    config_with,
    params_with,
    random_answers,
    random_clips,
    random_texts,
    run_params,
    save_run,
)
from jaxtyping import PyTree

from vlmae.cli.main import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.export import command, formats
from vlmae.export.folders import Checkpoint
from vlmae.export.programs import PAIR_PROGRAMS, check_program, described, programs
from vlmae.models.scoring import answer_log_probs, match_scores
from vlmae.models.video_language import build_model
from vlmae.ops.multiple_choice import Caption

WORDS, LETTERS, ROWS = 8, 5, 2
CHANGES = {
    "smaug": {
        "model.selector.kind": "transformer",
        "model.video.sparsify.eval_keep_rate": 0.7,
        "model.video.sparsify.stages": (0,),
        "data.task": "questions",
        "data.answer_len": LETTERS,
        "objectives.answer": 1.0,
        "objectives.answer_kind": "decoder",
    },
    "multi": {
        "model.fusion.kind": "multiway",
        "model.fusion.sampler.pooling": "block",
        "model.video.time_frames": 3,
        "model.video.time_depth": 1,
        "model.video.layout.relative_bias": "layer",
    },
}
NEEDS_ONNX = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="needs vlmae[onnx]",
)
FORMATS = ["stablehlo", pytest.param("onnx", marks=NEEDS_ONNX)]


def experiment(name: str) -> tuple[ExperimentConfig, PyTree]:
    """A small model: SMAUG's with an answer decoder, MuLTI's with a classifier."""
    absent = "classifier" if name == "smaug" else "answer_decoder"
    return config_with(CHANGES[name]), params_with(CHANGES[name], without=(absent,))


def inputs() -> dict[str, np.ndarray]:
    """Make what the lines of a card read, by the names that they use."""
    ids, mask = random_texts(ROWS, WORDS)
    answers = {"answer_ids": random_answers()[0][:ROWS], "answer_mask": random_answers()[1][:ROWS]}
    return {"frames": random_clips()[:ROWS], "ids": ids, "mask": mask} | answers


def outputs(model, frames, ids, mask, answer_ids, answer_mask) -> dict[str, jax.Array]:
    video, text = model.encode_video(frames), model.encode_text(ids, mask)
    found = {
        "clips": model.embed_video(video).mean(axis=1),
        "texts": model.embed_text(text),
        "scores": match_scores(model, video, text),
    }
    fused = model.fuse(video, text)
    if model.has_variable("params", "classifier"):
        return found | {"logits": model.classify(fused)}
    answers = Caption(answer_ids, answer_mask)
    return found | {"log_probs": answer_log_probs(model, answers, text, fused)}


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    config, params = experiment(name)
    run = jax.jit(functools.partial(build_model(config).apply, method=outputs))
    return jax.device_get(run({"params": params}, **inputs()))


@pytest.mark.parametrize(
    "format", ["stablehlo", pytest.param("onnx", marks=[NEEDS_ONNX, pytest.mark.slow])]
)
@pytest.mark.parametrize("name", CHANGES)
def test_the_card_s_lines_give_what_the_model_gives(name, format, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    config, params = experiment(name)
    workdir = save_run(config, tmp_path / "run", params)
    (workdir / "classes.json").write_text(json.dumps(list("abcde")))
    command.export(workdir, folder, format)
    files = [f"{x}.{format}" for x in ("answer", "encode_text", "encode_video", "match")]
    words = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    more = ["README.md", "SHA256SUMS", "classes.json", "programs.json"]
    assert {path.name for path in folder.iterdir()} == {*files, *more, *words}
    where = str(Path(command.__file__).parents[1]).encode()
    assert not any(where in path.read_bytes() for path in folder.iterdir())

    card = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    found = inputs()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], found)
    found |= {"clips": found["video"]["embedding"], "texts": found["text"]["embedding"]}
    for key, value in expected(name).items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5 * scale, err_msg=key)
    for fact in ("| step | 7 |", "| retrieval/t2v_r1 | 12.34 |", "-> scores float32[b]"):
        assert fact in card


def test_signatures():
    """From the config alone: names, types and shapes, with any batch size."""
    multi = programs(*experiment("multi"))
    assert set(multi) == {"encode_video", "encode_text", "match", "answer"}
    assert described(multi["encode_video"].inputs) == {"video": "uint8[b, 4, 16, 16, 3]"}
    assert described(multi["answer"].outputs) == {"logits": f"float32[b, {CLASSES}]"}
    assert set(multi["match"].inputs) == {"text_tokens", "text_mask", "video_tokens", "frame_cls"}
    smaug = programs(*experiment("smaug"))["answer"]
    assert described(smaug.outputs) == {"log_probs": "float32[b]"}
    assert smaug.inputs["answer_mask"].shape[1:] == (LETTERS,)


@pytest.mark.parametrize("format", FORMATS)
def test_a_component_goes_with_torch_only(format, tmp_path):
    with pytest.raises(ValueError, match=f"component is text, but format {format} holds the whole"):
        command.export(tmp_path, tmp_path / "out", format, "text")


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_is_never_overwritten_nor_left_half(format, tmp_path):
    config = config_with(CHANGES["multi"])
    workdir = save_run(config, tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is no empty folder"):
        command.export(workdir, tmp_path / "out", format)
    wider = config_with(CHANGES["multi"] | {"model.embed_dim": 9})
    save_run(wider, workdir, params=run_params(config))
    with pytest.raises(ValueError, match=r"video_projection/dense/bias is \(8,\) instead of"):
        command.export(workdir, tmp_path / "new", format)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_program_that_differs_is_refused():
    shapes = {"x": jax.ShapeDtypeStruct((2, 3), "float32")}
    right, wrong = (lambda given, k=k: {"y": given["x"] * k} for k in (1.0, 1.001))
    check_program("encode", right, right, shapes)
    with pytest.raises(ValueError, match="encode: y of the export differs by"):
        check_program("encode", right, wrong, shapes)
    broken = lambda given: {"y": given["x"] * np.nan}  # noqa: E731
    with pytest.raises(ValueError, match="differs by nan"):
        check_program("encode", right, broken, shapes)
    narrow = lambda given: {"y": given["x"][:1]}  # noqa: E731
    with pytest.raises(ValueError, match=r"y of the export is \[1, 3\] instead of \[2, 3\]"):
        check_program("encode", right, narrow, shapes)


@NEEDS_ONNX
def test_an_onnx_file_that_differs_is_refused(tmp_path, monkeypatch):
    """It is written as it should be; then with another module than it is compared with."""
    from vlmae.export import onnx as export_onnx

    config, params = experiment("multi")
    found = {"encode_text": programs(config, params)["encode_text"]}
    source = Checkpoint(tmp_path, config, params, 7)
    export_onnx.write_onnx(found, source, tmp_path)
    right = (tmp_path / "encode_text.onnx").read_bytes()

    def save_another(module, program, path):
        path.write_bytes(right)
        module.model.text_encoder.block_0.mlp_norm.bias.data += 0.001

    monkeypatch.setattr(export_onnx, "save_program", save_another)
    message = "ONNX has no parity: nothing is written: encode_text: .* of the export differs by"
    with pytest.raises(ValueError, match=message):
        export_onnx.write_onnx(found, source, tmp_path)


@NEEDS_ONNX
def test_what_torch_cannot_write_is_one_line(tmp_path, monkeypatch):
    import torch

    from vlmae.export.onnx import write_onnx

    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no operator\nfor this")

    monkeypatch.setattr(torch.onnx, "export", fail)
    config, params = experiment("multi")
    message = "ONNX has no encode_video with parity: nothing is written: no operator$"
    with pytest.raises(ValueError, match=message):
        write_onnx(programs(config, params), Checkpoint(tmp_path, config, params, 7), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "component", "message"),
    [
        ("tflite", "all", "format is 'tflite', not one of torch, stablehlo, onnx"),
        ("torch", "audio", "component is 'audio', not one of all, text, video"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(tmp_path, format, component, message):
    with pytest.raises(ValueError, match=message):
        formats.export_run(tmp_path, tmp_path / "out", format, component)


def test_the_command_line_offers_what_the_tables_hold(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert "{torch,stablehlo,onnx}" in shown and "{all,text,video}" in shown


def test_every_program_has_a_version_in_torch():
    """Of the pairs; those of the encoders are in every model."""
    onnx = pytest.importorskip("vlmae.export.onnx")
    assert {program.method for program in PAIR_PROGRAMS.values()} <= onnx.METHODS.keys()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    needy = formats.FORMATS["onnx"]._replace(packages=("json", "no_such_package"))
    monkeypatch.setitem(formats.FORMATS, "onnx", needy)
    message = r"format onnx needs no_such_package: pip install 'vlmae\[onnx\]'"
    with pytest.raises(ValueError, match=message):
        command.export(tmp_path, tmp_path / "out", "onnx")
    assert not any(tmp_path.iterdir())
