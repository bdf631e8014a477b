"""What a trained model is asked when it is served, as programs over named arrays.

A clip goes in as uint8 frames; what `encode_video` and `encode_text` give back goes into `match`
and `answer`. StableHLO and ONNX files hold these programs, under these names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, PyTree

from vlmae.choices import Caption
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.scoring import answer_log_probs, match_scores

PROGRAMS = "programs.json"
TOLERANCE = 1e-4  # of an output's scale
Shapes = dict[str, jax.ShapeDtypeStruct]
Arrays = dict[str, Any]


class Program(NamedTuple):
    """A method of the bound model over named arrays, and their shapes; "b" is any batch size."""

    method: Callable[..., dict[str, Array]]
    inputs: Shapes
    outputs: Shapes


def encode_video(model: VideoLanguageModel, video: Array) -> dict[str, Array]:
    """Tokens of uint8 frames [b t h w 3], what stands for each frame, and a unit vector."""
    features = model.encode_video(video)
    outputs = {"tokens": features.tokens, "frame_cls": features.frame_cls}
    if model.has_variable("params", "video_projection"):
        outputs["embedding"] = model.embed_video(features).mean(axis=1)
    return outputs


def encode_text(model: VideoLanguageModel, ids: Array, mask: Array) -> dict[str, Array]:
    """Tokens of word ids [b l], and a unit vector; the mask is True on real words."""
    text = model.encode_text(ids, mask)
    outputs = {"tokens": text.tokens}
    if model.has_variable("params", "text_projection"):
        outputs["embedding"] = model.embed_text(text)
    return outputs


def match(model: VideoLanguageModel, **inputs: Array) -> dict[str, Array]:
    """The logit of a match less that of none, of text i with clip i."""
    return {"scores": match_scores(model, *_features(inputs))}


def classify(model: VideoLanguageModel, **inputs: Array) -> dict[str, Array]:
    """Logits of the answers or labels."""
    return {"logits": model.classify(model.fuse(*_features(inputs)))}


def score_answers(
    model: VideoLanguageModel, answer_ids: Array, answer_mask: Array, **inputs: Array
) -> dict[str, Array]:
    """The log-probability of answer i, [CLS] words [SEP], to question i about clip i."""
    text, video = _features(inputs)
    answers = Caption(answer_ids, answer_mask)
    return {"log_probs": answer_log_probs(model, answers, text, model.fuse(text, video))}


def programs(config: ExperimentConfig, params: PyTree) -> dict[str, Program]:
    """The programs that the parameters allow, by name."""
    (b,) = export.symbolic_shape("b")
    data = config.data
    size, words, letters = data.image_size, data.text_len, data.answer_len

    def of(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    def program(method: Callable, inputs: Shapes) -> Program:
        outputs = jax.eval_shape(bound(config, params, method), inputs)
        return Program(method, inputs, outputs)

    mask = of("bool", words)
    video = {"video": of("uint8", data.eval.num_frames, size, size, 3)}
    clip = program(encode_video, video)
    text = program(encode_text, {"ids": of("int32", words), "mask": mask})
    found = {"encode_video": clip, "encode_text": text}
    pair = {"text_tokens": text.outputs["tokens"], "text_mask": mask}
    pair |= {"video_tokens": clip.outputs["tokens"], "frame_cls": clip.outputs["frame_cls"]}
    if "match_head" in params:
        found["match"] = program(match, pair)
    if "classifier" in params:
        found["answer"] = program(classify, pair)
    if "answer_decoder" in params:
        answers = {"answer_ids": of("int32", letters), "answer_mask": of("bool", letters)}
        found["answer"] = program(score_answers, answers | pair)
    return found


def bound(
    config: ExperimentConfig, params: PyTree, method: Callable
) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """A method of the model with its parameters, as a function of a dict of arrays.

    Its attention is XLA's: what is exported has to run on other devices.
    """
    model = build_model(override(config, {"model.attention": "xla"}))
    variables = {"params": jax.tree.map(jnp.asarray, params)}

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        return model.apply(variables, **inputs, method=method)

    return run


def check_program(
    name: str,
    run: Callable[[Arrays], Arrays],
    exported: Callable[[Arrays], Arrays],
    inputs: Shapes,
    row_counts: tuple[int, ...] = (2, 3),
) -> None:
    """Compares two versions of a program on random rows, as many as each of the counts.

    Raises:
      ValueError: an output differs by more than 1e-4 of its scale; names it and the difference.
    """
    rng = np.random.default_rng(0)
    for rows in row_counts:
        given = {key: _random(rng, rows, x) for key, x in inputs.items()}
        found = exported(given)
        for key, value in run(given).items():
            expected, actual = (np.asarray(x, "float32") for x in (value, found[key]))
            if actual.shape != expected.shape:
                shapes = f"{list(actual.shape)} instead of {list(expected.shape)}"
                raise ValueError(f"{name}: {key} of the export is {shapes}")
            difference = np.abs(actual - expected).max()
            if not difference <= TOLERANCE * max(1.0, np.abs(expected).max()):
                raise ValueError(f"{name}: {key} of the export differs by {difference:.2g}")


def write_signatures(found: dict[str, Program], folder: Path) -> None:
    """Writes the names, types and shapes of all inputs and outputs to `programs.json`."""
    signatures = {
        name: {"inputs": described(program.inputs), "outputs": described(program.outputs)}
        for name, program in found.items()
    }
    text = json.dumps({"programs": signatures}, indent=2)
    (folder / PROGRAMS).write_text(text + "\n", "utf-8")


def described(shapes: Shapes) -> dict[str, str]:
    """Arrays in words, as "float32[b, 4]"."""
    return {key: f"{x.dtype}[{', '.join(map(str, x.shape))}]" for key, x in shapes.items()}


def _features(inputs: dict[str, Array]) -> tuple[TextFeatures, VideoFeatures]:
    """What the fusion reads of both; where tokens stood does not matter to it."""
    tokens = inputs["video_tokens"]
    nowhere = jnp.zeros(tokens.shape[:3], "int32")
    video = VideoFeatures(tokens, inputs["frame_cls"], (nowhere,), nowhere.astype(bool))
    return TextFeatures(inputs["text_tokens"], inputs["text_mask"]), video


def _random(rng: np.random.Generator, rows: int, x: jax.ShapeDtypeStruct) -> np.ndarray:
    shape = (rows, *x.shape[1:])
    if x.dtype == "bool":  # a prefix, as padding leaves it
        return np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (rows, 1))
    if x.dtype in ("uint8", "int32"):
        return rng.integers(0, 256 if x.dtype == "uint8" else 2, shape).astype(x.dtype)
    return rng.normal(size=shape).astype(x.dtype)
