"""Operations by formula, against the products of the traced training step, and XLA's count."""

import functools

import jax
import pytest
from helpers import SMALL, init_params
from traced_products import traced_operations

from data_pipelines.config import SourceConfig
from vlmae.analysis.operations import operations_per_clip, show, step_operations
from vlmae.config import ExperimentConfig, save_config
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch
from vlmae.gradients import make_gradients
from vlmae.model_config import VitLayout
from vlmae.models.video_language import build_model

# All widths differ, so that none can stand for another.
BASE = override(
    SMALL,
    {
        "data.image_size": 24,
        "model.video.width": 24,
        "model.video.mlp_dim": 40,
        "model.text.mlp_dim": 44,
        "model.text.max_len": 64,
        "model.pixel_decoder.width": 12,
        "model.embed_dim": 10,
        "model.answer_depth": 1,
        "objectives.vtm": 0.0,
        "objectives.mlm": 0.0,
        "objectives.mvm": 0.0,
    },
)
FRAMES = 4


def only(*names: str) -> dict[str, float]:
    """Changes that train these objectives alone."""
    weights = dict.fromkeys(("vtc", "vtm", "mlm", "mvm"), 0.0) | dict.fromkeys(names, 1.0)
    return {f"objectives.{name}": weight for name, weight in weights.items()}


def part(prefix: str, **fields) -> dict:
    """Changes of fields of one part of the config."""
    return {f"{prefix}.{name}": value for name, value in fields.items()}


def step_of(config: ExperimentConfig, frames: int) -> tuple:
    """The gradients of a config as a function, and the shapes that it takes."""
    batch = abstract_batch(config, SourceConfig(num_frames=frames))
    init = functools.partial(init_params, build_model(config), objectives=config.objectives)
    params = jax.eval_shape(init, batch)
    model = build_model(config, deterministic=False)
    gradients = make_gradients(model, config.objectives, 1, config.optim.accumulate_steps)
    return gradients, params, batch, jax.eval_shape(jax.random.key, 0)


def traced(config: ExperimentConfig, frames: int) -> float:
    """Operations per clip, those that a compiler sees are twice the same taken once."""
    rows, objectives, model = config.data.batch_size, config.objectives, config.model
    mined = 0  # the similarities that VTM computes a second time
    if objectives.vtc and objectives.vtm:
        mined = 2 * model.embed_dim * (frames * model.video.width + model.text.width + rows)
    return traced_operations(*step_of(config, frames)) / rows - mined


def thinned(rest: str = "fuse", score: str = "cls_attention") -> dict:
    """Fewer tokens after the first block."""
    fields = {"keep_rate": 0.6, "stages": (0,), "rest": rest, "score": score}
    return part("model.video.sparsify", **fields)


def multiway(**sampler) -> dict:
    """The multiway fusion."""
    sizes = part("model.fusion.sampler", video_latents=5, text_latents=3, **sampler)
    return {"model.fusion.kind": "multiway", **sizes}


def adapted(kind: str, text: int = 2, **more) -> dict:
    """Frozen blocks: one of two of the video encoder, `text` of two of the text encoder."""
    fields = {"kind": kind, "width": 6, "num_heads": 2}
    video = part("model.video.adapter", **fields, frozen_blocks=1)
    words = part("model.text.adapter", **fields, frozen_blocks=text)
    return {"model.video.depth": 2, "model.text.depth": 2, **video, **words, **more}


REMAT, SELECTIVE = {"model.remat": "full"}, {"model.remat": "selective"}
TUBE = {"model.video.mask.scheme": "tube"}
MCM = {
    "objectives.mcm": 1.0,
    "objectives.mcm_len": 40,
    "objectives.mcm_template": "which? {} {} {}",
    "objectives.mcm_template_ids": (1, 7, 8, -1, -1, -1, 2),
}
ANSWERS = {"data.task": "questions", "objectives.answer": 1.0, "model.num_classes": 9, **only()}
DECODES = {**ANSWERS, "objectives.answer_kind": "decoder", "data.answer_len": 5}
LABELS = {"data.task": "labels", "objectives.label": 1.0, "model.num_classes": 7, **only()}
VIDEOMAE = VitLayout(cls_token=False, frame_cls="mean", tubelet=2, joint=True)

CASES = {
    "dense": {"model.video.mask.scheme": "none"},
    "smaug": {**only("vtc", "vtm", "mlm", "mvm"), **thinned(), **REMAT},
    "smaug, selective": {**only("vtc", "vtm", "mlm", "mvm"), **thinned(), **SELECTIVE},
    "thinned": {**thinned(), **part("model.video", depth=3)},
    "thinned, by all, dropped": {**thinned("drop", "mean_attention"), **REMAT},
    "temporal, thinned by noise": {**thinned(score="random"), **TUBE, "model.video.time_depth": 1},
    "temporal, aligned": {**TUBE, "model.video.time_depth": 2, **REMAT},
    "chunks, thinned by norm": {
        **thinned(score="norm"),
        "model.video.frames_per_chunk": 2,
        **REMAT,
    },
    "one chunk, extra token": {
        "model.video.frames_per_chunk": 4,
        "model.video.layout": VitLayout(extra_tokens=1),
    },
    "joint": {"model.video.layout": VIDEOMAE, "model.video.positions": "sincos_clip"},
    "some targets": {**only("mvm"), **thinned(), "model.pixel_decoder.target_ratio": 0.5},
    "options together": {**only(), **MCM},
    "options alone": {**only(), **MCM, "objectives.mcm_kind": "score", "model.fusion.depth": 2},
    "answers decoded": {**DECODES, **REMAT, "model.answer_depth": 2},
    "answers decoded from latents": {**DECODES, **multiway(pooling="none", guidance="none")},
    "labels, scored frames": {**LABELS, **part("model.selector", kind="mlp")},
    "concatenated": {**only("vtm"), "model.fusion.kind": "concat", **REMAT},
    "concatenated, one width": {
        **ANSWERS,
        "model.fusion.kind": "concat",
        "model.video.width": 16,
        **part("model.selector", kind="random"),
    },
    "multiway": {**only("mlm"), **multiway()},
    "multiway, queries": {**LABELS, **multiway(guidance="queries", pooling="global"), **REMAT},
    "multiway, attention": {
        **LABELS,
        **multiway(pooling="attention", share_attention=False),
        **part("model.selector", kind="transformer", width=20),
    },
    "side adapters": adapted("side", **{"model.video.frames_per_chunk": 1}),
    "side adapters, fewer": adapted("side", 1, **REMAT, **{"model.video.time_depth": 1}),
    "inline adapters": adapted("inline", **REMAT),
    "inline adapters, selective": adapted("inline", **SELECTIVE),
    "multiway, selective": {**LABELS, **multiway(), **SELECTIVE},
    "inline adapters, thinned": adapted("inline", 1, **thinned()),
    "frozen, masked text for all": adapted(
        "none", 1, **only("vtc", "mlm"), **{"objectives.mask_text_for": "all"}, **REMAT
    ),
    "frozen text": adapted("none", **only("vtc", "mlm")),
    "frozen text, pooled": adapted("none", **LABELS, **multiway(pooling="mean")),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas_count_the_products_of_the_step(name):
    config = override(BASE, CASES[name])
    assert operations_per_clip(config, FRAMES) == traced(config, FRAMES)


def test_still_images_and_clips():
    changes = {"model.video.frames_per_chunk": 2, "model.video.time_depth": 1}
    config = override(BASE, {**CASES["labels, scored frames"], **changes})
    for frames in (1, 6):
        assert operations_per_clip(config, frames) == traced(config, frames)


def test_a_batch_in_parts_is_encoded_twice_for_vtc():
    config = override(BASE, {"optim.accumulate_steps": 3})
    assert operations_per_clip(config, FRAMES) == traced(config, FRAMES)
    both_texts = override(config, {**only("vtc", "mlm"), "model.video.time_depth": 1})
    assert operations_per_clip(both_texts, FRAMES) == traced(both_texts, FRAMES)
    parts, whole = step_operations(config, FRAMES), step_operations(BASE, FRAMES)
    assert parts.pop("first pass for VTC").forward == 0
    assert parts == whole


def test_xla_counts_little_more():
    """Of a model of realistic width, whose work element by element is small."""
    layer = {"width": 384, "num_heads": 6, "mlp_dim": 1536}
    config = override(
        BASE,
        {
            **only("vtc", "mvm"),
            **part("model.video", **layer, patch_size=16),
            **part("model.text", **layer),
            **part("model.pixel_decoder", width=192),
            **part("data", image_size=112, text_len=32),
        },
    )
    gradients, *shapes = step_of(config, FRAMES)
    counted = jax.jit(gradients).lower(*shapes).cost_analysis()["flops"]
    ratio = counted / config.data.batch_size / operations_per_clip(config, FRAMES)
    assert 1 < ratio < 1.1


def test_what_the_data_complete_is_asked_for():
    with pytest.raises(ValueError, match=r"model.text.vocab_size is 0"):
        step_operations(override(BASE, {**only("mlm"), "model.text.vocab_size": 0}), 1)
    with pytest.raises(ValueError, match=r"model.num_classes is 0"):
        step_operations(override(BASE, {**LABELS, "model.num_classes": 0}), 1)
    with pytest.raises(ValueError, match=r"objectives.mcm_template_ids is empty"):
        step_operations(override(BASE, {**MCM, "objectives.mcm_template_ids": ()}), 1)


def test_the_table_of_a_run(tmp_path, capsys):
    save_config(override(BASE, {**only("vtc", "mvm"), **REMAT}), tmp_path / "config.json")
    show(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("A clip of 4 frames:\n")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"][2:]
    names = ["video encoder", "text encoder", "similarities", "pixel decoder", "total"]
    assert [row[0] for row in rows] == names
    figures = [[float(cell) for cell in row[1:]] for row in rows]
    for forward, backward, again, total in figures:
        assert total == pytest.approx(forward + backward + again, abs=0.02)
    for column in zip(*figures, strict=True):
        assert column[-1] == pytest.approx(sum(column[:-1]), abs=0.02)
