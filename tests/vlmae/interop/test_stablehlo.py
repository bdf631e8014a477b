"""Exported programs, read back by jax alone, against the model; any batch size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize
from jax import export

from vlmae.config_tree import override
from vlmae.interop.stablehlo import check_program, write_stablehlo
from vlmae.models.video_language import build_model
from vlmae.scoring import match_scores

MULTI = {
    "model.fusion.kind": "multiway",
    "model.video.time_frames": 2,
    "model.video.time_depth": 1,
    "model.video.sparsify.eval_keep_rate": 0.7,
    "model.video.sparsify.stages": (0,),
    "model.selector.kind": "mlp",
    "data.eval.num_frames": 2,
}


@pytest.mark.parametrize("changes", [{"data.eval.num_frames": 2}, MULTI], ids=["smaug", "multi"])
def test_programs_rank_as_the_model_does(changes, tmp_path):
    config = override(SMALL, changes)
    model, batch = build_model(config), random_batch()
    params = randomize(init_params(model, batch, config.objectives), 0)
    write_stablehlo(config, params, tmp_path)
    read = {path.stem: export.deserialize(path.read_bytes()) for path in tmp_path.glob("*.stab*")}
    assert set(read) == {"encode_video", "encode_text", "match"}
    described = json.loads((tmp_path / "programs.json").read_text())["programs"]
    assert described["match"]["outputs"] == {"scores": "float32[b]"}

    rows = slice(0, 5)
    inputs = (batch.video[rows], batch.text_ids[rows], batch.text_mask[rows])

    def outputs(model, video, ids, mask):
        features, text = model.encode_video(video), model.encode_text(ids, mask)
        vectors = model.embed_video(features).mean(axis=1), model.embed_text(text)
        return *vectors, match_scores(model, text, features)

    apply = jax.jit(lambda *x: model.apply({"params": params}, *x, method=outputs))
    clips, texts, scores = apply(*inputs)
    video = read["encode_video"].call({"video": inputs[0]})
    text = read["encode_text"].call({"ids": inputs[1], "mask": inputs[2]})
    pair = {"text_tokens": text["tokens"], "text_mask": inputs[2]}
    pair |= {"video_tokens": video["tokens"], "frame_cls": video["frame_cls"]}
    np.testing.assert_allclose(video["embedding"], clips, atol=1e-5)
    np.testing.assert_allclose(text["embedding"], texts, atol=1e-5)
    np.testing.assert_allclose(read["match"].call(pair)["scores"], scores, atol=1e-5)


def test_a_program_that_differs_is_refused():
    shapes = {"x": jax.ShapeDtypeStruct((2, 3), "float32")}
    right, wrong = (lambda given, k=k: {"y": given["x"] * k} for k in (1.0, 1.001))
    check_program("encode", right, right, shapes)
    with pytest.raises(ValueError, match="encode: y of the export differs by"):
        check_program("encode", right, wrong, shapes)
    broken = lambda given: {"y": given["x"] * jnp.nan}  # noqa: E731
    with pytest.raises(ValueError, match="differs by nan"):
        check_program("encode", right, broken, shapes)
