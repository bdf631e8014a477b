"""A finished run as two functions into the shared space: of clips, and of texts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from data_pipelines.tokenize import Tokenizer, load_tokenizer
from vlmae.checkpoint import load_params
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.config_tree import flatten
from vlmae.evaluators.encode import Trained, map_rows, program
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.sharding import batch_shards, check_batch_size, make_mesh, path_name
from vlmae.workdir import load_run, tokenizer_of


class Embedder:
    """A trained model that compares clips with texts.

    Attributes:
      config: of the run.
      checkpoint: names the parameters and all of the config that a clip's vector depends on.
    """

    def __init__(self, config: ExperimentConfig, params: PyTree, step: int, tokenizer: Tokenizer):
        """Raises ValueError if the devices do not divide the evaluation batch."""
        mesh = make_mesh(MeshConfig())
        check_batch_size(config.data.eval_batch_size, mesh, "data.eval_batch_size")
        trained = Trained(build_model(config), params, mesh, config.data.eval_batch_size)
        self.config, self.checkpoint = config, checkpoint_name(config, params, step)
        self._tokenizer, self._mesh = tokenizer, mesh
        # Compiled once for each shape, however many clips and queries follow.
        self._run_clips = program(trained, _embed_clips)
        self._run_texts = program(trained, _embed_texts)

    def clips(self, video: UInt8[np.ndarray, "b t h w 3"]) -> Float[np.ndarray, "b e"]:
        """The mean of the unit vectors of each clip's frames."""
        with jax.set_mesh(self._mesh):
            return map_rows(self._run_clips, (video,), self.config.data.eval_batch_size)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b e"]:
        """The unit vector of each text.

        Raises:
          ValueError: a text is empty.
        """
        if not all(text.strip() for text in texts):
            raise ValueError("the query is empty")
        inputs = self._tokenizer.encode(texts, self.config.data.text_len)
        with jax.set_mesh(self._mesh):
            return map_rows(self._run_texts, inputs, batch_shards(self._mesh))


def _embed_clips(
    model: VideoLanguageModel, video: UInt8[Array, "b t h w 3"]
) -> Float[Array, "b e"]:
    return model.embed_video(model.encode_video(video)).mean(axis=1)


def _embed_texts(
    model: VideoLanguageModel, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
) -> Float[Array, "b e"]:
    return model.embed_text(model.encode_text(ids, mask))


def load_embedder(workdir: Path) -> Embedder:
    """The newest checkpoint of a work directory, on all devices of this machine.

    Raises:
      FileNotFoundError: no config or no checkpoint.
      ValueError: the run was trained without VTC, so nothing can be compared.
    """
    config = load_run(workdir)
    if not config.objectives.vtc:
        raise ValueError(
            f"{workdir} was trained without VTC (objectives.vtc=0): "
            "its texts and clips have no common space to search in"
        )
    params, step = load_params(workdir)
    return Embedder(config, params, step, load_tokenizer(tokenizer_of(workdir)))


def checkpoint_name(config: ExperimentConfig, params: PyTree, step: int) -> str:
    """Step and SHA-256 of what a clip's vector depends on: parameters, model, frames (ours).

    A step alone would not do: another run may lie at the same path.
    """
    digest = hashlib.sha256()
    used = (flatten(config.model), config.data.image_size, config.data.eval.num_frames)
    digest.update(json.dumps(used, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return f"{config.name}, step {step}, sha256 {digest.hexdigest()[:16]}"
