"""Small models with every part, random parameters for them, and batches."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from helpers import CLS, FIRST_WORD, SEP, SMALL, VOCAB, init_params, random_batch
from jaxtyping import PyTree

from data_pipelines.text.tokenize import Tokenizer
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import path_name
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.result import write_result
from vlmae.runs.workdir import save_config
from vlmae.weights.export_format import FORMAT_VERSION, TEMPORAL, Exported, parameter_shapes

PARTS = (
    "answer_decoder",
    "choice_head",
    "classifier",
    "fusion",
    "logit_bias",
    "match_head",
    "pixel_decoder",
    "temperature",
    "text_encoder",
    "text_projection",
    "video_encoder",
    "video_projection",
    "word_bias",
    "word_transform",
)
OPTIONS, CLASSES, FRAMES, CLIPS = 4, 5, 4, 3
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
WORDS = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))]


def config_with(changes: dict) -> ExperimentConfig:
    """A small experiment, with fields changed."""
    base = {
        "model.num_classes": CLASSES,
        "model.answer_depth": 1,
        "model.video.depth": 2,
        "data.eval.num_frames": FRAMES,
    }
    return override(SMALL, base | changes)


def exported_with(changes: dict) -> Exported:
    """What an export of this experiment would describe, with every part that it can have."""
    config = config_with(changes)
    model = config.model
    extra = [TEMPORAL] if model.video.time_frames or model.video.time_depth else []
    extra += ["frame_selector"] if model.selector.kind != "none" else []
    extra += ["word_reader"] if model.fusion.kind == "multiway" else []
    parts = tuple(sorted([*PARTS, *extra]))
    return Exported(model, config.data.image_size, parts, OPTIONS, step=7)


def description(exported: Exported) -> dict:
    """The part of its `config.json` that the PyTorch module reads."""
    model = dataclasses.asdict(exported.model)
    return {"format_version": FORMAT_VERSION, **exported._asdict(), "model": model}


def random_params(exported: Exported, seed: int = 0) -> PyTree:
    """Random parameters of all its parts."""
    return random_tree(parameter_shapes(exported), seed)


def random_tree(shapes: dict[str, tuple[int, ...]], seed: int) -> PyTree:
    """Noise on every parameter: around one for scales, around zero for all else."""
    rng, params = np.random.default_rng(seed), {}
    for path, shape in shapes.items():
        *parents, leaf = path.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        noise = 0.2 * rng.normal(size=shape) + (leaf == "scale")
        node[leaf] = np.asarray(noise if leaf != "temperature" else 0.1, np.float32)
    return params


def random_clips(frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    """Noise in uint8 [b t h w 3]."""
    size = SMALL.data.image_size
    shape = (CLIPS, frames, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_texts(
    rows: int = CLIPS, length: int = 7, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Word ids and mask of texts of different lengths, the last of which is one word."""
    rng = np.random.default_rng(seed)
    lengths = np.append(rng.integers(3, length + 1, rows - 1), 1)
    ids = rng.integers(FIRST_WORD, VOCAB, (rows, length), dtype=np.int32)
    ids[:, 0] = CLS
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, ids, 0).astype(np.int32), mask


def random_answers(count: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of answers [CLS] words [SEP] of one to three words, all different."""
    rng = np.random.default_rng(2)
    ids = np.zeros((count, 5), np.int32)
    for row, first in enumerate(rng.permutation(np.arange(FIRST_WORD, VOCAB))[:count]):
        words = [first, *rng.integers(FIRST_WORD, VOCAB, row % 3)]
        ids[row, : len(words) + 2] = [CLS, *words, SEP]
    return ids, ids > 0


def run_params(config: ExperimentConfig, seed: int = 0) -> PyTree:
    """Random parameters of all that the objectives of a run use."""

    def init() -> PyTree:
        batch = random_batch(2, config.data.eval.num_frames)
        return init_params(build_model(config), batch, config.objectives)

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init))
    return random_tree({path_name(path): leaf.shape for path, leaf in leaves}, seed)


def params_with(changes: dict, *, without: Sequence[str] = ()) -> PyTree:
    """Random parameters of an experiment with every part but those named."""
    params = random_params(exported_with(changes))
    return {part: tree for part, tree in params.items() if part not in without}


def save_run(config: ExperimentConfig, workdir: Path, params: PyTree | None = None) -> Path:
    """A work directory as a run of seven steps leaves it."""
    workdir.mkdir(exist_ok=True)
    save_config(config, workdir / "config.json")
    Tokenizer.from_vocabulary(WORDS).save(workdir / "tokenizer")
    params = run_params(config) if params is None else params
    with Checkpoints(workdir) as checkpoints:
        checkpoints.manager.delete(7) if checkpoints.latest_step() else None
        checkpoints.save(7, {"params": params})
    write_result(workdir, 7, {"retrieval/t2v_r1": 12.341}, 4)
    environment = {"python": "3.0", "packages": {"jax": "0.0"}}
    (workdir / "environment.json").write_text(json.dumps(environment))
    return workdir
