"""The two sides of a comparison: our training step and the same step in PyTorch."""

import abc
import os
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Key, PyTree

from data_pipelines.schema.records import Batch
from experiments.benchmarks.cost import (
    FULL,
    MASKED,
    Size,
    base_config,
    compile_step,
    noise_on,
    one_device,
)
from experiments.benchmarks.own_process import peak_resident_bytes, resident_bytes
from experiments.benchmarks.peer import Peer, TorchBatch
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig
from vlmae.config.tree import override
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops import multiple_choice
from vlmae.parallel.malloc import keep_freed_memory
from vlmae.training.features import Context, extract, keys_of
from vlmae.training.objectives import compute_losses, draw_options
from vlmae.training.pairs import hard_negatives
from vlmae.training.step import make_init

# Before JAX looks for devices. Both sides share a GPU's memory, and both keep what a step on the
# CPU frees.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
keep_freed_memory()
Form = Literal["eager", "compiled", "graphs"]  # of the peer, by torch.compile
MODES: dict[Form, dict[str, str]] = {"compiled": {}, "graphs": {"mode": "reduce-overhead"}}
ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
# [CLS] what does it show [SEP] (a) {} (b) {} (c) {} (d) {} [SEP]; the token ids are arbitrary
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
    """Build the config of one line: 224 px, 32 words, no dropout."""
    changes = {
        "data.train.0.num_frames": frames,
        "model.text.dropout": 0.0,
        "model.attention": "cudnn" if ON_GPU else "xla",
    }
    return override(base_config(size, batch_size, DTYPE), changes | VARIANTS[name])


def draw(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> dict[str, Any]:
    """Draw all random choices of `compute_losses` with this key, by the names of `TorchBatch`."""
    keys = keys_of(key)
    features = extract(model, batch, keys, config)
    text, video = hard_negatives(model, features, Context(batch, keys["vtm"], config))
    drawn = {
        "kept_ids": features.video.stage_patch_ids[0],
        "paint_noise": jax.random.uniform(keys["mvm"], features.video.removed_mask.shape),
        "hidden_ids": features.masked_tokens.ids,
        "hidden": features.masked_tokens.targets_mask,
        "other_text": text.index,
        "other_video": video.index,
        "question": None,
        "answer": jnp.zeros_like(text.index),
        "asked": jnp.ones_like(batch.valid),
    }
    if config.mcm:
        options, answer, asked = draw_options(batch, keys["mcm"], config)
        question = multiple_choice.compose(config.mcm_template_ids, options, config.mcm_len)
        drawn |= {"question": tuple(question), "answer": answer, "asked": asked}
    return drawn


def to_torch_batch(batch: Batch, drawn: dict[str, Any]) -> TorchBatch:
    """Convert a batch and its random choices to tensors on PyTorch's device."""
    given = {name: getattr(batch, name) for name in ("video", "text_ids", "text_mask")}

    def tensor(x: Array) -> torch.Tensor:
        x = torch.tensor(np.asarray(x), device="cuda" if ON_GPU else "cpu")
        return x.long() if x.dtype == torch.int32 else x

    return TorchBatch(**jax.tree.map(tensor, given | drawn))


def make_peer(config: ExperimentConfig, params: PyTree) -> Peer:
    """Build the peer on its device."""
    return Peer(config, jax.device_get(params)).to("cuda" if ON_GPU else "cpu")


def half_precision() -> torch.autocast:
    """Autocast to bfloat16 on a GPU; float32 elsewhere."""
    return torch.autocast("cuda" if ON_GPU else "cpu", torch.bfloat16, enabled=ON_GPU)


def losses_of(config: ExperimentConfig) -> tuple[float, float]:
    """Compute the loss of our step and of the peer's, from the same parameters and choices.

    Without the noise that only training has: frames are selected by their scores alone, and every
    patch is decoded.
    """
    keep_rate = config.model.video.sparsify.keep_rate
    calm = override(config, {"model.video.sparsify.eval_keep_rate": keep_rate})
    calm = override(calm, {"model.pixel_decoder.target_ratio": 0.0})
    model, key, batch = build_model(calm), jax.random.key(0), noise_on(one_device(), calm)
    params = jax.jit(make_init(calm))(0).params

    @jax.jit
    def run(params: PyTree, batch: Batch) -> tuple[Array, dict]:
        variables, config = {"params": params}, calm.objectives
        loss = model.apply(variables, batch, key, config, method=compute_losses).value
        return loss, model.apply(variables, batch, key, config, method=draw)

    ours, drawn = run(params, batch)
    peer = make_peer(calm, params)
    with torch.no_grad(), half_precision():
        theirs = peer(to_torch_batch(batch, drawn))
    return float(ours), float(theirs)


class Side(abc.ABC):
    """Successive training steps in this process: forward, backward, AdamW."""

    bytes_before: int  # of this process, before there were parameters

    @abc.abstractmethod
    def step(self) -> None:
        """Run one step and wait for its end."""

    @abc.abstractmethod
    def device_bytes(self) -> int:
        """Return the peak memory allocated on the GPU."""

    def seconds(self) -> float:
        """Measure one step in seconds."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Measure the peak memory of one step: parameters, optimizer state and activations.

        On a GPU, what the framework has allocated. On a CPU, the growth of the process since before
        parameters existed: without our compiled program, but with what torch.compile generates.
        """
        if not ON_GPU:
            return peak_resident_bytes(self.step) - self.bytes_before
        self.step()
        return self.device_bytes()


class OurSide(Side):
    """Our step of a config."""

    def __init__(self, config: ExperimentConfig):
        """Compile the step."""
        mesh = one_device()
        self.batch = noise_on(mesh, config)
        self.program = compile_step(config, mesh, self.batch)
        init = self.program.init.lower(0).compile()  # compiled before memory is counted
        self.bytes_before = resident_bytes()
        self.state = init(0)

    def step(self) -> None:
        """Run one step."""
        self.state, metrics = self.program.run(self.state, self.batch, self.program.values)
        jax.block_until_ready((self.state, metrics))

    def device_bytes(self) -> int:
        """See `Side`."""
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class PeerSide(Side):
    """The peer's step, with our parameters and our random choices."""

    def __init__(self, config: ExperimentConfig, form: Form):
        """Build the peer; `torch.compile` compiles it in the first step."""
        batch, model = noise_on(one_device(), config), build_model(config)
        params = jax.jit(make_init(config))(0).params

        @jax.jit
        def run(params: PyTree, batch: Batch) -> dict[str, Any]:
            given = (batch, jax.random.key(0), config.objectives)
            return model.apply({"params": params}, *given, method=draw)

        self.batch = to_torch_batch(batch, run(params, batch))
        params = jax.device_get(params)
        jax.clear_caches()  # our programs are not the peer's memory
        # The host copy is freed once the peer has its own, and must not hide it.
        self.bytes_before = resident_bytes() - sum(x.nbytes for x in jax.tree.leaves(params))
        self.peer = make_peer(config, params)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [x for x in self.peer.parameters() if x.requires_grad],
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            weight_decay=optim.weight_decay,
            fused=True,  # PyTorch's fastest
        )
        self.form = form
        self.loss_of = torch.compile(self.peer, **MODES[form]) if form in MODES else self.peer

    def queue_step(self) -> None:
        """Start a step, and on a GPU do not wait for its end."""
        if self.form == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with half_precision():
            loss = self.loss_of(self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """See `Side`."""
        self.queue_step()
        if ON_GPU:  # kernels are only queued until then
            torch.cuda.synchronize()

    def device_bytes(self) -> int:
        """See `Side`."""
        return torch.cuda.max_memory_allocated()
