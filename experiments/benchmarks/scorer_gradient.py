"""The frame scorer's gradient against that of the expected loss, by enumeration of all choices.

    python -m experiments.benchmarks.scorer_gradient

For every fusion, pooling and scorer: two of five frames are read, so the expectation over the
Gumbel draws is a sum over ten choices. The estimator, averaged over them, is compared with the
true gradient by their cosine: 1 is exact. It is of the first order, so frames that have nothing in
common are its worst case; those of a video share most of what they show. Weights are random. The
table takes some minutes on one core.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.benchmarks.report import print_report, write_report
from vlmae.config.model import (
    FrameSelectorConfig,
    FusionConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from vlmae.models.frame_selector import SELECTORS, FrameChoice, FrameSelector, keep_frames
from vlmae.models.fusion import FUSIONS
from vlmae.models.multiway import POOLINGS
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops.token_pruning import swap_probabilities
from vlmae.runs.tables import markdown_table

WIDTH, FRAMES, KEPT, CLIPS, WORDS = 32, 5, 2, 8, 4
SIZES = TextEncoderConfig(
    40, max_len=12, width=WIDTH, depth=1, num_heads=2, mlp_dim=32, dropout=0.0
)
READERS = [(kind, "block") for kind in FUSIONS if kind != "multiway"]  # these have no pooling
READERS += [("multiway", pooling) for pooling in (*POOLINGS, "none")]
SCORERS = [kind for kind, selector in SELECTORS.items() if selector.has_parameters]
LEVELS = (2.0, 0.0)  # of what all frames share, in deviations of what is a frame's own

# (features of the clips, a choice for each) -> one value a clip
Values = Callable[[VideoFeatures, FrameChoice], Float[Array, " b"]]


class Gradients(NamedTuple):
    """Gradients with respect to the scores of each clip's frames."""

    estimate: Float[Array, "b t"]  # straight-through, averaged over all choices
    true: Float[Array, "b t"]


def random(*shape: int, seed: int) -> Float[np.ndarray, "..."]:
    """Draw from N(0, 1)."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def clips_with_level(level: float) -> VideoFeatures:
    """Draw normalized frames that share `level` times one vector a clip; infinity: equal frames."""
    common, own = random(CLIPS, 1, 1, WIDTH, seed=3), random(CLIPS, FRAMES, 4, WIDTH, seed=4)
    x = np.tile(common, (1, FRAMES, 4, 1)) if np.isinf(level) else level * common + own
    x -= x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    ids = np.zeros((CLIPS, FRAMES, 3), np.int32)
    features = VideoFeatures(x[:, :, 1:], x[:, :, 0], (ids,), ids > 0)
    return jax.tree.map(jnp.asarray, features)


def texts() -> TextFeatures:
    """Draw a text for each clip."""
    return TextFeatures(
        jnp.asarray(random(CLIPS, WORDS, WIDTH, seed=1)), jnp.ones((CLIPS, WORDS), bool)
    )


def fused_values(kind: str, pooling: str) -> Values:
    """Read the fused [CLS] of a fusion with random parameters."""
    text, read = texts(), jnp.asarray(random(WIDTH, seed=2))
    fusion = FUSIONS[kind](FusionConfig(kind, 1, SamplerConfig(6, 3, pooling)), SIZES)
    params = jax.jit(fusion.init)(jax.random.key(5), text, clips_with_level(0.0))

    def values(video: VideoFeatures, choice: FrameChoice) -> Float[Array, " b"]:
        return fusion.apply(params, text, keep_frames(video, choice))[:, 0] @ read

    return values


def probabilities(
    scores: Float[Array, "b t"], pairs: Int[np.ndarray, "s 2"]
) -> Float[Array, "b s"]:
    """Compute the probability of each pair of frames, drawn without replacement by the softmax."""
    p = jax.nn.softmax(scores, axis=1)
    first, second = p[:, pairs[:, 0]], p[:, pairs[:, 1]]
    return first * second / (1 - first) + second * first / (1 - second)


def enumerate_choices(values: Values) -> Callable[[Array, VideoFeatures], Gradients]:
    """Make a function from scores and clips to both gradients, compiled once."""
    pairs = np.array(list(itertools.combinations(range(FRAMES), KEPT)))

    @jax.jit
    def gradients(scores: Float[Array, "b t"], video: VideoFeatures) -> Gradients:
        def one(frames: Int[Array, " k"]) -> tuple[Array, Array]:
            def value(scores: Float[Array, "b t"]) -> tuple[Array, Array]:
                chosen = jnp.tile(frames, (CLIPS, 1))
                choice = FrameChoice(chosen, scores, swap_probabilities(scores, chosen))
                found = values(video, choice)
                return found.sum(), found

            return jax.grad(value, has_aux=True)(scores)

        estimates, losses = jax.lax.map(one, jnp.asarray(pairs))
        estimate = jnp.einsum("bs,sbt->bt", probabilities(scores, pairs), estimates)
        true = jax.grad(lambda scores: (probabilities(scores, pairs) * losses.T).sum())(scores)
        return Gradients(estimate, true)

    return gradients


def scorer(kind: str, video: VideoFeatures) -> tuple[Float[Array, "b t"], Callable]:
    """Score the frames by a scorer with random parameters; also pull gradients back to these."""
    config = FrameSelectorConfig(kind, frames=KEPT, width=8, depth=1, num_heads=2)
    module, text = FrameSelector(config), texts()
    params = jax.jit(module.init)(jax.random.key(6), text, video)
    leaves, tree = jax.tree.flatten(params)
    noise = [0.3 * random(*x.shape, seed=i) for i, x in enumerate(leaves)]
    params = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    scores, pull = jax.vjp(jax.jit(lambda params: module.apply(params, text, video).scores), params)
    return scores, lambda grad: jnp.concatenate([x.ravel() for x in jax.tree.leaves(pull(grad))])


def cosines(x: Float[Array, "b t"], y: Float[Array, "b t"]) -> Float[np.ndarray, " b"]:
    """Compute the cosine of each row of x with that of y."""
    x, y = np.asarray(x), np.asarray(y)
    return (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def rows() -> Iterator[list[str]]:
    """Yield the rows of the table, one for each fusion, pooling and scorer."""
    for kind, pooling in READERS:
        gradients = enumerate_choices(fused_values(kind, pooling))
        for name in SCORERS:
            cells = [kind, pooling if kind == "multiway" else "-", name]
            for level in LEVELS:
                video = clips_with_level(level)
                scores, pull = scorer(name, video)
                found = gradients(scores, video)
                cosine = cosines(*found)
                at_parameters = cosines(*(pull(gradient)[None] for gradient in found))[0]
                cells += [f"{np.median(cosine):.2f} ({cosine.min():.2f})", f"{at_parameters:.2f}"]
            equal = clips_with_level(np.inf)
            scores, _ = scorer(name, clips_with_level(2.0))
            cells.append(f"{np.abs(gradients(scores, equal).estimate).max():.0e}")
            yield cells


def main(out_dir: Path = Path("runs/benchmarks")) -> None:
    """Print the table and write it to `out_dir`.

    Args:
      out_dir: folder for the report.
    """
    head = ["fusion", "pooling", "scorer"]
    for title in ("shared level 2", "nothing shared"):
        head += [f"{title}: median (lowest) of the clips", f"{title}: at the scorer's parameters"]
    table = markdown_table([[*head, "equal frames: largest gradient"], *rows()])
    settings = {"clips": CLIPS, "frames": FRAMES, "kept": KEPT, "width": WIDTH}
    print_report(table, settings)
    write_report(out_dir, "scorer_gradient", table, settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
