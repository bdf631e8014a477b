"""A trained model as StableHLO programs, for serving without this library's code (`jax.export`).

Each program holds its parameters and takes any batch size. Clips go in as uint8 frames; what
`encode_video` and `encode_text` give back goes into `match` and `answer`.
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
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.scoring import answer_log_probs, match_scores

PLATFORMS = ("cpu", "cuda")
SIGNATURES = "programs.json"
Shapes = dict[str, jax.ShapeDtypeStruct]


class Program(NamedTuple):
    """A method of the bound model over named arrays, and their shapes; "b" is any batch size."""

    method: Callable[..., dict[str, Array]]
    inputs: Shapes


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
    data, model = config.data, build_model(config)
    size, words, letters = data.image_size, data.text_len, data.answer_len

    def of(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    video = {"video": of("uint8", data.eval.num_frames, size, size, 3)}
    text = {"ids": of("int32", words), "mask": of("bool", words)}
    encoded = jax.eval_shape(_bound(model, params, encode_video), video)
    read = jax.eval_shape(_bound(model, params, encode_text), text)
    pair = {
        "text_tokens": read["tokens"],
        "text_mask": text["mask"],
        "video_tokens": encoded["tokens"],
        "frame_cls": encoded["frame_cls"],
    }
    answers = {"answer_ids": of("int32", letters), "answer_mask": of("bool", letters)}
    found = {
        "encode_video": Program(encode_video, video),
        "encode_text": Program(encode_text, text),
    }
    if "match_head" in params:
        found["match"] = Program(match, pair)
    if "classifier" in params:
        found["answer"] = Program(classify, pair)
    if "answer_decoder" in params:
        found["answer"] = Program(score_answers, answers | pair)
    return found


def write_stablehlo(config: ExperimentConfig, params: PyTree, folder: Path) -> None:
    """Writes a file for each program, and their inputs and outputs to `programs.json`.

    Every file is read again and run on random input first.

    Raises:
      ValueError: a program does not give what the model gives; names it and the difference.
    """
    signatures = {}
    for name, program in programs(config, params).items():
        run = _bound(build_model(config), params, program.method)
        exported = export.export(jax.jit(run), platforms=PLATFORMS)(program.inputs)
        data = exported.serialize()
        check_program(name, run, export.deserialize(data).call, program.inputs)
        (folder / f"{name}.stablehlo").write_bytes(data)
        outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        signatures[name] = {
            "inputs": {key: _described(x) for key, x in program.inputs.items()},
            "outputs": {key: _described(x) for key, x in outputs.items()},
        }
    text = json.dumps({"platforms": PLATFORMS, "programs": signatures}, indent=2)
    (folder / SIGNATURES).write_text(text + "\n")


def check_program(name: str, run: Callable, exported: Callable, inputs: Shapes) -> None:
    """Raises ValueError unless both give the same on two and on three random rows, to 1e-4."""
    rng = np.random.default_rng(0)
    for rows in (2, 3):
        given = {key: _random(rng, rows, x) for key, x in inputs.items()}
        for key, expected in run(given).items():
            difference = float(jnp.abs(exported(given)[key] - expected).max())
            if not difference <= 1e-4 * max(1.0, float(jnp.abs(expected).max())):
                raise ValueError(f"{name}: {key} of the export differs by {difference:.2g}")


def _bound(model: VideoLanguageModel, params: PyTree, method: Callable) -> Callable:
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        return model.apply({"params": params}, **inputs, method=method)

    return run


def _features(inputs: dict[str, Array]) -> tuple[TextFeatures, VideoFeatures]:
    """What the fusion reads of both; where tokens stood does not matter to it."""
    tokens = inputs["video_tokens"]
    nowhere = jnp.zeros(tokens.shape[:3], "int32")
    video = VideoFeatures(tokens, inputs["frame_cls"], (nowhere,), nowhere.astype(bool))
    return TextFeatures(inputs["text_tokens"], inputs["text_mask"]), video


def _random(rng: np.random.Generator, rows: int, x: jax.ShapeDtypeStruct) -> Array:
    shape = (rows, *x.shape[1:])
    if x.dtype == "bool":  # a prefix, as padding leaves it
        return jnp.arange(shape[1]) < jnp.asarray(rng.integers(1, shape[1] + 1, (rows, 1)))
    if x.dtype in ("uint8", "int32"):
        return jnp.asarray(rng.integers(0, 256 if x.dtype == "uint8" else 2, shape), x.dtype)
    return jnp.asarray(rng.normal(size=shape), x.dtype)


def _described(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
