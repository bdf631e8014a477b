"""Time and memory of a contrastive training step, against OpenCLIP's.

    pip install open_clip_torch
    python -m experiments.benchmarks.openclip
    python -m experiments.benchmarks.openclip --sizes B --dropped 0 --forms fused compiled

OpenCLIP's ViT-S-16 and ViT-B-16, and `experiments/contrastive.py pictures` with the same towers:
224 px, 77 tokens, some patches dropped or none. Both sides first compute the loss from the same
weights; a difference stops the benchmark. Then each side runs in a process of its own. A round
times one step of every side, and a ratio compares two steps of a round. All sides share the cores
that are given, one by default, so that no ratio depends on how well a machine shares its threads.
"""

import math
import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.schema.records import Batch
from experiments import contrastive
from experiments.benchmarks.cost import Size, one_device
from experiments.benchmarks.own_process import OwnProcess, in_own_process, resident_bytes
from experiments.benchmarks.report import compare, format_ratio, print_report, write_report
from experiments.benchmarks.sides import DTYPE, ON_GPU, OurSide, Side, half_precision
from experiments.benchmarks.step import check_losses
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import ModelConfig
from vlmae.config.tree import override
from vlmae.models.embeddings import normalize_pixels
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import put_batch
from vlmae.runs.tables import markdown_table
from vlmae.training.objectives import compute_losses
from vlmae.training.step import abstract_batch, make_init, random_batch
from vlmae.weights.families import CLIP, CLIP_TEXT
from vlmae.weights.tensors import Tensors, write_tensors

Form = Literal["published", "fused", "compiled"]
"""Of OpenCLIP: with AdamW as its training script makes it; with PyTorch's fused AdamW; compiled by
`torch.compile` too."""
DEVICE = "cuda" if ON_GPU else "cpu"
# (as Hugging Face's CLIP names a tensor, as OpenCLIP does)
NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("embeddings.patch_embedding.", "conv1."),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.", "token_embedding."),
    ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."),
    ("visual_projection.weight", "proj"),
    ("text_projection.weight", "text_projection"),
)


def published_name(size: Size) -> str:
    """Return OpenCLIP's name of a model."""
    return f"ViT-{size}-16"


def our_config(size: Size, dropped: float, batch_size: int) -> ExperimentConfig:
    """Build the config of an OpenCLIP model, trained with this share of the patches dropped."""
    import open_clip

    theirs = open_clip.get_model_config(published_name(size))
    towers = {}
    for name, family in (("vision", CLIP), ("text", CLIP_TEXT)):
        tower = theirs[f"{name}_cfg"]
        heads = tower.get("heads", tower["width"] // 64)
        fields = {"hidden_size": tower["width"], "num_attention_heads": heads}
        fields |= {"intermediate_size": 4 * tower["width"], "patch_size": 16, "hidden_act": "gelu"}
        towers[name] = family.fields(family.complete(fields))
    scheme = "random" if dropped else "none"
    changes = {f"model.video.{name}": value for name, value in towers["vision"].items()}
    changes |= {f"model.text.{name}": value for name, value in towers["text"].items()}
    changes |= {
        "model.text.pooling": "cls",
        "model.embed_dim": theirs["embed_dim"],
        "model.video.mask.scheme": scheme,
        "model.video.mask.ratio": dropped,
        "model.dtype": DTYPE,
        "model.attention": "cudnn" if ON_GPU else "xla",
        "data.batch_size": batch_size,
        "train.epochs": 0.0,
        "optim.warmup_share": 0.0,
        "train.eval_every_epochs": 0.0,
        "train.save_every_epochs": 0.0,
    }
    return override(contrastive.pictures(), changes)


def make_batch(config: ExperimentConfig) -> Batch:
    """Make pictures of noise, with texts that fill the 77 tokens and end with CLIP's last word."""
    words = config.model.text.vocab_size
    batch = random_batch(abstract_batch(config), words - 1)
    ids = np.array(batch.text_ids)
    ids[:, -1] = words - 1
    return batch._replace(text_ids=ids)


def to_torch(batch: Batch, config: ExperimentConfig) -> tuple[Tensor, Tensor]:
    """Convert a batch to OpenCLIP's pictures, float [b 3 h w], and texts, [b l]."""
    pictures = normalize_pixels(batch.video[:, 0], config.model.video.layout)
    pictures = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).contiguous()
    return pictures.to(DEVICE), torch.from_numpy(np.array(batch.text_ids)).long().to(DEVICE)


def to_open_clip(params: PyTree, model: ModelConfig) -> Tensors:
    """Convert parameters of two towers to OpenCLIP's names and layouts.

    Raises:
      UserError: a bias that CLIP does not have is not zero.
    """
    state: Tensors = {}
    for family, prefix in ((CLIP, "visual."), (CLIP_TEXT, "")):
        tensors = write_tensors(params, family, model)
        for name in [name for name in tensors if "q_proj" in name]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            tensors[name.replace("self_attn.q_proj.", "attn.in_proj_")] = np.concatenate(parts)
        for name, tensor in tensors.items():
            for theirs, own in NAMES:
                name = name.replace(theirs, own)
            state[prefix + name] = tensor.T if name in ("proj", "text_projection") else tensor
    return state


def losses_of(size: Size, batch_size: int) -> tuple[float, float]:
    """Compute our loss and OpenCLIP's from the same parameters, with all patches."""
    import open_clip

    config = our_config(size, 0.0, batch_size)
    batch, model = make_batch(config), build_model(config)
    params = jax.jit(make_init(config))(0).params
    given = (put_batch(batch, one_device()), jax.random.key(0), config.objectives)
    run = jax.jit(
        lambda params: model.apply({"params": params}, *given, method=compute_losses).value
    )
    ours = float(run(params))
    peer = open_clip.create_model(published_name(size)).to(DEVICE)
    state = to_open_clip(jax.device_get(params), config.model)
    peer.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state.items()})
    with torch.no_grad(), half_precision():
        theirs = float(open_clip.ClipLoss()(*peer(*to_torch(batch, config))))
    return ours, theirs


class OurPair(OurSide):
    """Our step, with its operations and parameters."""

    def counts(self) -> tuple[float, int]:
        """Return the operations of a step, as XLA counts them, and the number of parameters."""
        return self.program.flops, sum(x.size for x in jax.tree.leaves(self.state.params))


class OpenClipSide(Side):
    """OpenCLIP's training step."""

    def __init__(self, size: Size, dropped: float, batch_size: int, form: Form):
        """Build the model; `torch.compile` compiles it in the first step."""
        import open_clip

        config = our_config(size, dropped, batch_size)
        self.batch = to_torch(make_batch(config), config)
        self.bytes_before = resident_bytes()
        self.model = open_clip.create_model(
            published_name(size), force_patch_dropout=dropped, device=DEVICE
        ).train()
        self.loss = open_clip.ClipLoss()
        # As open_clip_train.main groups them.
        matrices = [x for x in self.model.parameters() if x.ndim >= 2]
        others = [x for x in self.model.parameters() if x.ndim < 2]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": others, "weight_decay": 0.0},
                {"params": matrices, "weight_decay": optim.weight_decay},
            ],
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            fused=None if form == "published" else True,
        )
        self.run = torch.compile(self.model) if form == "compiled" else self.model

    def step(self) -> None:
        """See `Side`."""
        with half_precision():
            loss = self.loss(*self.run(*self.batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        if ON_GPU:
            torch.cuda.synchronize()

    def device_bytes(self) -> int:
        """See `Side`."""
        return torch.cuda.max_memory_allocated()

    def counts(self) -> tuple[float, int]:
        """Return the operations of a step, as PyTorch counts them, and the number of parameters."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops(), sum(x.numel() for x in self.model.parameters())


def measure(
    size: Size, dropped: float, batch_size: int, forms: tuple[Form, ...], rounds: int
) -> dict[str, Any]:
    """Measure a line: seconds, memory, time to the first step and counts of every side."""
    arguments = {"ours": (OurPair, our_config(size, dropped, batch_size))}
    arguments |= {form: (OpenClipSide, size, dropped, batch_size, form) for form in forms}
    measured: dict[str, Any] = {"size": size, "dropped": dropped}
    measured |= {key: {} for key in ("secs", "first_step_secs", "gib", "flops", "parameters")}
    with ExitStack() as stack:
        sides = {}
        for name, (make, *given) in arguments.items():
            start = time.perf_counter()
            sides[name] = stack.enter_context(OwnProcess(make, *given))
            sides[name].call("step")
            measured["first_step_secs"][name] = time.perf_counter() - start
            measured["gib"][name] = sides[name].call("peak_bytes") / 2**30
            if name != "compiled":  # whose operations are those of the others
                flops, parameters = sides[name].call("counts")
                measured["flops"][name], measured["parameters"][name] = flops, parameters
            measured["secs"][name] = []
        for _ in range(rounds):
            for name, side in sides.items():
                measured["secs"][name].append(side.call("seconds"))
    ours = measured["secs"]["ours"]
    ratios = {form: compare(measured["secs"][form], ours) for form in forms}
    return measured | {"ratios": ratios}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a table, a row a line and side; "x": how many times faster ours is than that side."""
    head = ["ViT", "dropped", "side", "s a step", "ours x (range)", "GiB", "s to the first step"]
    cells = []
    for row in rows:
        for name, secs in row["secs"].items():
            counts = [row[key].get(name) for key in ("flops", "parameters")]
            cells.append(
                [
                    f"{row['size']}/16",
                    f"{row['dropped']:g}",
                    "ours" if name == "ours" else f"OpenCLIP, {name}",
                    f"{statistics.median(secs):.2f}",
                    format_ratio(row["ratios"][name]) if name in row["ratios"] else "",
                    f"{row['gib'][name]:.2f}",
                    f"{row['first_step_secs'][name]:.0f}",
                    f"{counts[0] / 1e9:,.0f}" if counts[0] else "",
                    f"{counts[1] / 1e6:.2f}" if counts[1] else "",
                ]
            )
    return markdown_table([[*head, "billion operations", "million parameters"], *cells])


def main(
    sizes: tuple[Size, ...] = ("S", "B"),
    dropped: tuple[float, ...] = (0.0, 0.5, 0.75),
    forms: tuple[Form, ...] = ("published", "fused"),
    batch_size: int = 8,
    rounds: int = 5,
    cores: int = 1,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table, and write openclip.md and openclip.json after each line.

    Args:
      sizes: S and B, or one of them.
      dropped: share of the patches that a training step leaves out (FLIP's masking).
      forms: of OpenCLIP: published (AdamW as its script makes it), fused, compiled.
      batch_size: pairs in a step.
      rounds: measured rounds, after three steps of each side.
      cores: of this machine that the sides may use.
      out_dir: where the table goes.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # of the processes, too
    settings = {"batch_size": batch_size, "rounds": rounds, "cores": cores, "dtype": DTYPE}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        check_losses(*in_own_process(losses_of, size, batch_size))
        for share in dropped:
            rows.append(measure(size, share, batch_size, forms, rounds))
            print(format_table(rows[-1:]), flush=True)
            write_report(out_dir, "openclip", format_table(rows), settings, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
