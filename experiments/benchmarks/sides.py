"""The two sides of a comparison: the same step of ours and of the peer, in every variant."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Key, PyTree

from data_pipelines.records import Batch
from experiments.benchmarks.cost import FULL, MASKED, Program, Size, base_config
from experiments.benchmarks.peer import Peer, TorchBatch
from vlmae import choices
from vlmae.config import ExperimentConfig, ObjectivesConfig
from vlmae.config_tree import override
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.objectives import draw_options, extract, hard_negatives, keys_of

# Read when JAX first looks for devices: both sides share a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
# [CLS] what does it show [SEP] (a) {} (b) {} (c) {} (d) {} [SEP], in ids that mean nothing here
QUESTION = (101, 1996, 102, 1997, -1, 1998, -1, 1999, -1, 2000, -1, 102)
MULTI = {
    "model.video.mask.scheme": "none",
    "model.video.mask.ratio": 0.0,
    "model.fusion.kind": "multiway",
    "objectives.mvm": 0.0,
    "objectives.mcm": 1.0,
    "objectives.mcm_template_ids": QUESTION,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "SMAUG, masked 0.65": MASKED,
    "SMAUG": FULL,
    "MuLTI": MULTI,
}


def variant_config(size: Size, frames: int, name: str, batch_size: int) -> ExperimentConfig:
    """The config of one line: 224 px, 32 words, no dropout."""
    changes = {
        "data.train.0.num_frames": frames,
        "model.text.dropout": 0.0,
        "model.attention": "cudnn" if ON_GPU else "xla",
    }
    return override(base_config(size, batch_size, DTYPE), changes | VARIANTS[name])


def draw(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> dict[str, Any]:
    """All that `compute_losses` draws with this key, by the names of `TorchBatch`."""
    keys = keys_of(key)
    features = extract(model, batch, keys["mask"], keys["mlm"], config)
    text, video = hard_negatives(model, features, batch, keys["vtm"], config)
    drawn = {
        "kept_ids": features.video.stage_places[0],
        "paint_noise": jax.random.uniform(keys["mvm"], features.video.removed_mask.shape),
        "hidden_ids": features.words.ids,
        "hidden": features.words.targets_mask,
        "other_text": text.index,
        "other_video": video.index,
        "question": None,
        "answer": jnp.zeros_like(text.index),
    }
    if config.mcm:
        options, answer, _ = draw_options(batch, keys["mcm"], config)
        question = choices.compose(config.mcm_template_ids, options, config.mcm_len)
        drawn |= {"question": tuple(question), "answer": answer}
    return drawn


def peer_batch(config: ExperimentConfig, params: PyTree, batch: Batch) -> TorchBatch:
    """A batch for the peer, with what our step of a config draws for it."""
    model, key = build_model(config), jax.random.key(0)
    return to_torch_batch(
        batch, model.apply({"params": params}, batch, key, config.objectives, method=draw)
    )


def to_torch_batch(batch: Batch, drawn: dict[str, Any]) -> TorchBatch:
    """A batch and its draws on PyTorch's device."""
    given = {name: getattr(batch, name) for name in ("video", "text_ids", "text_mask")}

    def tensor(x: Array) -> torch.Tensor:
        x = torch.tensor(np.asarray(x), device="cuda" if ON_GPU else "cpu")
        return x.long() if x.dtype == torch.int32 else x

    return TorchBatch(**jax.tree.map(tensor, given | drawn))


def make_peer(config: ExperimentConfig, params: PyTree) -> Peer:
    """The peer on its device."""
    return Peer(config, jax.device_get(params)).to("cuda" if ON_GPU else "cpu")


def seconds(run: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def half_precision() -> torch.autocast:
    """bfloat16 for what is computed in here on a GPU, float32 elsewhere."""
    return torch.autocast("cuda" if ON_GPU else "cpu", torch.bfloat16, enabled=ON_GPU)


def our_step(program: Program) -> Callable[[Batch], None]:
    """Steps of training, one after the other, from a new state on."""
    states = [program.init(0)]  # a list, so that no name keeps a state that was given away

    def step(batch: Batch) -> None:
        state, _ = jax.block_until_ready(program.run(states.pop(), batch))
        states.append(state)

    return step


def peer_step(peer: Peer, config: ExperimentConfig, compiled: bool) -> Callable[[TorchBatch], None]:
    """Forward, backward and AdamW, as they are or compiled."""
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [x for x in peer.parameters() if x.requires_grad],
        lr=optim.learning_rate,
        betas=(optim.b1, optim.b2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    loss_of = torch.compile(peer) if compiled else peer

    def step(batch: TorchBatch) -> None:
        with half_precision():
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ON_GPU:
            torch.cuda.synchronize()

    return step
