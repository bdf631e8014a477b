"""A whole CLIP from a folder in Hugging Face's layout: both encoders, projections, words."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import SMALL, init_params, random_batch
from jaxtyping import PyTree
from safetensors.numpy import load_file
from torch_weights import randomize

from data_pipelines.schema.checks import UserError
from data_pipelines.text.tokenize import Tokenizer, load_tokenizer
from vlmae.cli.run_experiment import with_vocabulary
from vlmae.config.experiment import ExperimentConfig, InitConfig
from vlmae.config.model import TextEncoderConfig, VideoEncoderConfig
from vlmae.config.tree import override
from vlmae.export.folders import Checkpoint, write_tokenizer
from vlmae.models.embeddings import normalize_pixels
from vlmae.models.text_encoder import TextEncoder
from vlmae.models.video_language import build_model
from vlmae.training.init_weights import read_initial, take_initial
from vlmae.training.source_model import with_source_model
from vlmae.weights.command import describe
from vlmae.weights.families import FAMILIES
from vlmae.weights.huggingface import load_published, open_published, read_folder
from vlmae.weights.tensors import write_tensors

LAYER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYER |= {"intermediate_size": 40}
TEXT_LEN, SHARED = 12, 24
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ["A red Ball", "ball,  red!", "a", "the red ball rolls and rolls on and on and on"]


class Clip(NamedTuple):
    """A CLIP of transformers, saved as users find it."""

    model: transformers.CLIPModel
    tokenizer: transformers.CLIPTokenizer
    folder: Path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = LAYER | {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LEN}
    text |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(END) for name in ("eos", "pad")}
    vision = LAYER | {"patch_size": 8, "image_size": SMALL.data.image_size}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=SHARED, logit_scale_init_value=3.0
    )
    model = transformers.CLIPModel(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return Clip(model, tokenizer, folder)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Byte pairs of a few words, in the order of CLIP's own: bytes, word ends, pairs, specials."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "a"), ("l", "l</w>"), ("ba", "ll</w>")]
    words = [*alphabet, *(f"{x}</w>" for x in alphabet), *map("".join, merges), BEGIN, END]
    return transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, merges)


def config_of(folder: Path, **init: str) -> ExperimentConfig:
    """A small experiment of both encoders' sizes, VTC alone."""
    changes = {
        "data.tokenizer": str(folder),
        "data.text_len": TEXT_LEN,
        "model.embed_dim": SHARED,
        "objectives.mlm": 0.0,
        "objectives.mvm": 0.0,
        "objectives.vtm": 0.0,
    }
    video = VideoEncoderConfig(**open_published(str(folder), "video").fields)
    text = TextEncoderConfig(**open_published(str(folder), "text").fields, max_len=TEXT_LEN)
    # The layouts are to be taken over.
    defaults = (dataclasses.replace(part, layout=type(part).layout) for part in (video, text))
    video, text = defaults
    model = dataclasses.replace(SMALL.model, video=video, text=text)
    config = override(dataclasses.replace(SMALL, model=model), changes)
    init = InitConfig(**init or {"text": str(folder), "video": str(folder)})
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))


def empty_params(config: ExperimentConfig) -> PyTree:
    """Zeros for all parameters of a run, since nothing of them is to be left."""
    init = partial(init_params, build_model(config), random_batch(), config.objectives)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(init))


def test_a_pair_compares_as_clip_does(clip):
    """From flags to cosines: layouts, words, both towers, projections, temperature."""
    config = with_source_model(config_of(clip.folder))
    tokenizer = load_tokenizer(clip.folder)
    config = with_vocabulary(config, tokenizer)
    model = build_model(config)
    params = empty_params(config)
    params, report = take_initial(read_initial(config), params)
    assert not any(word in report for word in ("missing", "unused", "left out")), report

    size = config.data.image_size
    frames = np.random.default_rng(0).integers(0, 256, (3, 1, size, size, 3), dtype=np.uint8)
    ids, mask = tokenizer.encode(TEXTS, TEXT_LEN)

    def compare(model, frames, ids, mask):
        video = model.embed_video(model.encode_video(frames))[:, 0]
        return video @ model.embed_text(model.encode_text(ids, mask)).T, model.temperature()

    apply = jax.jit(partial(model.apply, method=compare))
    ours, temperature = apply({"params": params}, *map(jnp.asarray, (frames, ids, mask)))
    layout = config.model.video.layout
    pixels = np.array(normalize_pixels(jnp.asarray(frames[:, 0]), layout))
    words = clip.tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=TEXT_LEN, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = clip.model(**words, pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    cosines = (theirs.image_embeds @ theirs.text_embeds.T).numpy()
    np.testing.assert_allclose(ours, cosines, atol=1e-5)
    np.testing.assert_allclose(ours / temperature, theirs.logits_per_image, rtol=1e-4, atol=1e-4)
    assert np.ptp(cosines) > 0.05  # else any other features would do


def test_the_text_tower_goes_in_and_out(clip):
    fields = open_published(str(clip.folder), "text").fields
    config = config_of(clip.folder)
    text = TextEncoderConfig(**fields, max_len=TEXT_LEN)
    model = dataclasses.replace(config.model, text=text)
    read = load_published(str(clip.folder), "text", model)
    assert not read.unused
    words = clip.tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    mask = words["attention_mask"].numpy().astype(bool)
    features = TextEncoder(text).apply(
        {"params": read.params["text_encoder"]},
        jnp.asarray(words["input_ids"].numpy()),
        jnp.asarray(mask),
    )
    with torch.no_grad():
        theirs = clip.model.text_model(**words)
    np.testing.assert_allclose(features.cls, theirs.pooler_output, atol=1e-5)
    for row, length in enumerate(mask.sum(axis=1)):  # the end comes first, then the others
        given, found = theirs.last_hidden_state[row].numpy(), features.tokens[row]
        np.testing.assert_allclose(found[1:length], given[: length - 1], atol=1e-5)
        np.testing.assert_allclose(found[length:], given[length:], atol=1e-5)

    tensors = write_tensors(read.params, FAMILIES["clip_text_model"], model)
    names = [name for name in load_file(clip.folder / "model.safetensors") if "vis" not in name]
    given = read_folder(clip.folder, lambda name: name in names)
    assert tensors.keys() == {name.removeprefix("text_model.") for name in given}
    for name, tensor in given.items():
        np.testing.assert_allclose(tensors[name.removeprefix("text_model.")], tensor, rtol=1e-6)
    written = FAMILIES["clip_text_model"].published(text, 0, 0)
    assert FAMILIES["clip_text_model"].fields(written) == fields


def test_one_tower_brings_no_temperature(clip):
    config = with_source_model(config_of(clip.folder, text=str(clip.folder)))
    params = read_initial(config).params
    assert "text_projection" in params and "temperature" not in params
    config = with_source_model(config_of(clip.folder, video=str(clip.folder)))
    assert read_initial(config).params.keys() == {"video_encoder", "video_projection"}
    assert not read_initial(config).unused  # the other tower is not listed, name by name


def test_a_projection_of_another_width_is_left_out(clip):
    config = override(with_source_model(config_of(clip.folder)), {"model.embed_dim": 8})
    _, report = take_initial(read_initial(config), empty_params(config))
    for part in ("text_projection", "video_projection"):
        assert f"left out, of another shape: {part}/dense/bias: ({SHARED},) in the source" in report


def test_masked_words_are_refused(clip):
    config = override(config_of(clip.folder), {"objectives.mlm": 1.0})
    fields = r"--objectives.mlm=1.0 .*--model.text.layout.causal=True"
    with pytest.raises(UserError, match=fields):
        with_source_model(config)
    with pytest.raises(UserError, match=r"--objectives.mlm=1.0 .* the tokenizer has no \[MASK\]"):
        with_vocabulary(config, load_tokenizer(clip.folder))


def test_other_fields_are_named(clip):
    config = override(with_source_model(config_of(clip.folder)), {"model.text.mlp_dim": 32})
    with pytest.raises(UserError, match=r"model.text.mlp_dim is 32, must be 40"):
        read_initial(config)


def test_both_parts_are_printed(clip, capsys):
    describe(str(clip.folder))
    said = capsys.readouterr().out
    for line in ("clip_text_model in", "text=TextEncoderConfig(", "video=VideoEncoderConfig("):
        assert line in said
    assert said.count(f"embed_dim={SHARED}  #") == 2
    assert "layout=TextLayout(eps=1e-05, activation='quick_gelu', pre_norm=True, causal=T" in said


# --- words


def test_words_are_those_of_transformers(clip):
    ids, mask = load_tokenizer(clip.folder).encode(TEXTS, TEXT_LEN)
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LEN}
    theirs = clip.tokenizer(TEXTS, **options)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, np.asarray(theirs["attention_mask"]).astype(bool))


def test_a_saved_tokenizer_is_the_same(clip, tmp_path):
    tokenizer = load_tokenizer(clip.folder)
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    again = load_tokenizer(tmp_path)
    assert (again.special, again.digest()) == (tokenizer.special, tokenizer.digest())
    assert again.special["[PAD]"] == END and again.mask_id is None
    np.testing.assert_array_equal(*(x.encode(TEXTS, 9)[0] for x in (tokenizer, again)))
    assert again.decode(tokenizer.encode(TEXTS[:1], 9)[0][0]) == "a red ball"


def test_an_export_holds_the_words(clip, tmp_path):
    load_tokenizer(clip.folder).save(tmp_path / "run" / "tokenizer")
    (tmp_path / "out").mkdir()
    config = override(SMALL, {"data.text_len": TEXT_LEN})
    write_tokenizer(Checkpoint(tmp_path / "run", config, {}, 0), tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LEN}
    ours, theirs = found(TEXTS, **options), clip.tokenizer(TEXTS, **options)
    assert (ours["input_ids"], ours["attention_mask"]) == (
        theirs["input_ids"],
        theirs["attention_mask"],
    )
    assert load_tokenizer(tmp_path / "out").digest() == load_tokenizer(clip.folder).digest()


def test_without_names_of_special_tokens_bert_s_are_missed(clip, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((clip.folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"special tokens \[PAD\] .* are missing"):
        load_tokenizer(tmp_path)


def test_the_text_of_a_special_token_is_text(clip):
    tokenizer: Tokenizer = load_tokenizer(clip.folder)
    ids, mask = tokenizer.encode([f"a {END} b"], 32)
    assert list(ids[0]).count(tokenizer.sep_id) == 1 + (~mask).sum()


# --- SigLIP


def test_the_text_tower_of_siglip_is_refused_by_name(tmp_path, capsys):
    sizes = LAYER | {"vocab_size": 20, "max_position_embeddings": 8}
    vision = LAYER | {"patch_size": 8, "image_size": 16}
    config = transformers.SiglipConfig(text_config=sizes, vision_config=vision)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="SigLIP's text tower reads padding"):
        open_published(str(tmp_path), "text")
    describe(str(tmp_path))
    said = capsys.readouterr().out
    assert "video=VideoEncoderConfig(" in said and "SigLIP's text tower reads padding" in said
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"model_type": "t5"}}))
    with pytest.raises(UserError, match="model_type 't5' is none of"):
        describe(str(tmp_path))
