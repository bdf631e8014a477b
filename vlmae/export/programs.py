"""Exported programs: functions of a trained model over named arrays, any batch size.

A clip goes in as uint8 frames; the outputs of `encode_video` and `encode_text` are the inputs of
`match` and `answer`. StableHLO and ONNX files hold these programs under these names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.export.folders import write_json
from vlmae.models.scoring import answer_log_probs, match_scores
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops.multiple_choice import Caption

PROGRAMS = "programs.json"
TOLERANCE = 1e-4  # of an output's scale
Shapes = dict[str, jax.ShapeDtypeStruct]
Arrays = dict[str, Any]


class Program(NamedTuple):
    """A function of the bound model over named arrays; "b" in a shape is any batch size."""

    method: Callable[..., dict[str, Array]]
    inputs: Shapes
    outputs: Shapes
    usage: str  # line of Python that calls it, for the model card


def encode_video(model: VideoLanguageModel, video: Array) -> dict[str, Array]:
    """Encode uint8 frames [b t h w 3] to tokens, a vector for each frame and a unit vector."""
    features = model.encode_video(video)
    outputs = {"tokens": features.tokens, "frame_cls": features.frame_cls}
    if model.has_variable("params", "video_projection"):
        outputs["embedding"] = model.embed_video(features).mean(axis=1)
    return outputs


def encode_text(model: VideoLanguageModel, ids: Array, mask: Array) -> dict[str, Array]:
    """Encode token ids [b l], with a mask that is True on real tokens, to tokens and a vector."""
    text = model.encode_text(ids, mask)
    outputs = {"tokens": text.tokens}
    if model.has_variable("params", "text_projection"):
        outputs["embedding"] = model.embed_text(text)
    return outputs


def match(model: VideoLanguageModel, **inputs: Array) -> dict[str, Array]:
    """Score text i with clip i: the logit of a match minus that of no match."""
    return {"scores": match_scores(model, *_features(inputs))}


def classify(model: VideoLanguageModel, **inputs: Array) -> dict[str, Array]:
    """Score all answers or labels, as logits [b c]."""
    return {"logits": model.classify(model.fuse(*_features(inputs)))}


def score_answers(
    model: VideoLanguageModel, answer_ids: Array, answer_mask: Array, **inputs: Array
) -> dict[str, Array]:
    """Score answer i, [CLS] words [SEP], to question i about clip i by its log-probability."""
    video, text = _features(inputs)
    answers = Caption(answer_ids, answer_mask)
    return {"log_probs": answer_log_probs(model, answers, text, model.fuse(video, text))}


class PairProgram(NamedTuple):
    """A program over encoded pairs of clip and text."""

    name: str
    method: Callable[..., dict[str, Array]]
    usage: str
    more_inputs: Mapping[str, str] = {}  # name -> dtype of arrays [b answer_len]


# Part of the parameters that allows a program -> the program.
PAIR_PROGRAMS: dict[str, PairProgram] = {
    "match_head": PairProgram("match", match, 'scores = load("match")(pair)["scores"]'),
    "classifier": PairProgram(
        "answer",
        classify,
        'logits = load("answer")(pair)["logits"]  # of the names in classes.json',
    ),
    "answer_decoder": PairProgram(
        "answer",
        score_answers,
        """# One answer, [CLS] words [SEP], for each row:
answers = {"answer_ids": answer_ids, "answer_mask": answer_mask}
log_probs = load("answer")(pair | answers)["log_probs"]""",
        {"answer_ids": "int32", "answer_mask": "bool"},
    ),
}


def programs(config: ExperimentConfig, params: PyTree) -> dict[str, Program]:
    """List the programs that the parameters allow, by name."""
    (b,) = export.symbolic_shape("b")  # lengths stay static, as in the run's evaluation
    data = config.data

    def of(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    def program(method: Callable, inputs: Shapes, usage: str) -> Program:
        # Shapes from a trace: a signature cannot differ from what the program returns.
        outputs = jax.eval_shape(bound(config, params, method), inputs)
        return Program(method, inputs, outputs, usage)

    mask = of("bool", data.text_len)
    frames = of("uint8", data.eval.num_frames, data.image_size, data.image_size, 3)
    ids = of("int32", data.text_len)
    clip = program(
        encode_video, {"video": frames}, 'video = load("encode_video")({"video": frames})'
    )
    text = program(
        encode_text,
        {"ids": ids, "mask": mask},
        'text = load("encode_text")({"ids": ids, "mask": mask})',
    )
    found = {"encode_video": clip, "encode_text": text}
    pair = {"video_tokens": clip.outputs["tokens"], "frame_cls": clip.outputs["frame_cls"]}
    # Features cross between programs, so a clip is encoded once for many texts.
    pair |= {"text_tokens": text.outputs["tokens"], "text_mask": mask}
    for part, (name, method, usage, more) in PAIR_PROGRAMS.items():
        if part in params:
            answers = {key: of(dtype, data.answer_len) for key, dtype in more.items()}
            found[name] = program(method, pair | answers, usage)
    return found


def bound(
    config: ExperimentConfig, params: PyTree, method: Callable
) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Bind a method to model and parameters, as a function of a dict of arrays."""
    # XLA's attention, since exported programs have to run on other devices than this one.
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
    """Compare two versions of a program on random rows, as many as each of the counts.

    Raises:
      UserError: an output differs by more than 1e-4 of its scale; names it and the difference.
    """
    # At least two counts for ONNX, whose exporter may have baked the sample's batch size in.
    rng = np.random.default_rng(0)
    for rows in row_counts:
        given = {key: _random(rng, rows, x) for key, x in inputs.items()}
        found = exported(given)
        for key, value in run(given).items():
            expected, actual = (np.asarray(x, "float32") for x in (value, found[key]))
            if actual.shape != expected.shape:
                shapes = f"{list(actual.shape)} instead of {list(expected.shape)}"
                raise UserError(f"{name}: {key} of the export is {shapes}")
            # Of the output's scale, since tokens and logits differ by orders of magnitude.
            difference = np.abs(actual - expected).max()
            # Negated, so that a NaN fails too.
            if not difference <= TOLERANCE * max(1.0, np.abs(expected).max()):
                raise UserError(f"{name}: {key} of the export differs by {difference:.2g}")


def write_signatures(found: dict[str, Program], folder: Path) -> None:
    """Write the names, types and shapes of all inputs and outputs to `programs.json`."""
    signatures = {
        name: {"inputs": described(program.inputs), "outputs": described(program.outputs)}
        for name, program in found.items()
    }
    write_json(folder / PROGRAMS, {"programs": signatures})


def described(shapes: Shapes) -> dict[str, str]:
    """Format types and shapes as text: "float32[b, 4]"."""
    return {key: f"{x.dtype}[{', '.join(map(str, x.shape))}]" for key, x in shapes.items()}


def _features(inputs: dict[str, Array]) -> tuple[VideoFeatures, TextFeatures]:
    """Rebuild the features of both encoders; patch ids are dropped, since no fusion reads them."""
    tokens = inputs["video_tokens"]
    patch_ids = jnp.zeros(tokens.shape[:3], "int32")
    removed = patch_ids.astype(bool)
    video = VideoFeatures(tokens, inputs["frame_cls"], (patch_ids,), removed)
    return video, TextFeatures(inputs["text_tokens"], inputs["text_mask"])


def _random(rng: np.random.Generator, rows: int, x: jax.ShapeDtypeStruct) -> np.ndarray:
    shape = (rows, *x.shape[1:])
    if x.dtype == "bool":  # True on a prefix, as in the mask of a padded text
        return np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (rows, 1))
    # Token ids of 0 and 1 are in every vocabulary.
    if x.dtype in ("uint8", "int32"):
        return rng.integers(0, 256 if x.dtype == "uint8" else 2, shape).astype(x.dtype)
    return rng.normal(size=shape).astype(x.dtype)
