"""Search in a folder: ranks as evaluation does, embeds only what it must, says what it skips."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from PIL import Image

from data_pipelines.loading.evaluation import eval_data
from data_pipelines.media import decode
from data_pipelines.media.transforms import eval_view
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.config import SourceConfig
from data_pipelines.storage.stored import open_source
from data_pipelines.text.tokenize import load_tokenizer
from vlmae.cli.main import main
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.experiment import MeshConfig, load_config
from vlmae.config.tree import override
from vlmae.evaluation.encode import encode_clips, encode_texts
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.checkpoint import load_params
from vlmae.runs.inference import EvalContext
from vlmae.runs.model import Model
from vlmae.runs.workdir import save_config
from vlmae.search import page
from vlmae.search.command import answer, examples, load_model, open_folder
from vlmae.search.folder import FolderSearch, Update, index_path, update_index
from vlmae.search.index import Index, block_paths, load_index

ONLY_VTC = {f"objectives.{name}": 0.0 for name in ("vtm", "mlm", "mvm")}


@pytest.fixture(scope="module")
def workdir(tiny_data_dir, tmp_path_factory) -> Path:
    """A run of two steps. Its parameters are nothing to rank by, but they rank."""
    folder = tmp_path_factory.mktemp("searched_run")
    changes = {"data.data_dir": str(tiny_data_dir), "train.steps": 2, **ONLY_VTC}
    run_experiment(override(tiny_experiment.get_config(), changes), folder)
    return folder


@pytest.fixture(scope="module")
def model(workdir) -> Model:
    return load_model(workdir)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three videos, one of them in a subfolder, an image, and a file that is neither."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.mp4", "b.MP4", "sub/c.mp4")):
        (folder / name).write_bytes(noise_clip(seed))
    Image.fromarray(noise(9)[0]).save(folder / "still.png")
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture
def embedded(monkeypatch) -> Counter:
    """Counts the clips that go through the encoder, by their number of frames."""
    counts, embed_video = Counter(), Model.embed_video

    def count(self, video):
        counts.update(len(clip) for clip in video)
        return embed_video(self, video)

    monkeypatch.setattr(Model, "embed_video", count)
    return counts


def noise(seed: int) -> np.ndarray:
    """Frames of blurred noise: what H.264 can store, and no two alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), "uint8")
    return small.repeat(8, axis=1).repeat(8, axis=2)


def noise_clip(seed: int) -> bytes:
    return encode_video(noise(seed), fps=8)


def update(index: Index | None, folder: Path, model: Model) -> Update:
    return update_index(index, folder, model, lambda index: None)


def vectors(index: Index) -> dict[str, np.ndarray]:
    names = [file.name for file in index.files]
    return dict(zip(names, index.embeddings, strict=True))


def test_ranks_as_the_retrieval_evaluator(workdir, model, tiny_data_dir, tmp_path):
    """The clips of the test split, as files of a folder, get its scores from every caption."""
    records = open_source(SourceConfig("shapes", "test"), tiny_data_dir)
    for i in range(len(records)):
        (tmp_path / f"{i:02d}.mp4").write_bytes(records[i]["media"])
    config = model.config
    data = eval_data(dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer")))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trained = EvalContext(build_model(config), load_params(workdir)[0], mesh, batch_size=5)
    clips = encode_clips(trained, data)
    scores = encode_texts(trained, data.texts).embeddings @ clips.embeddings.T

    found = FolderSearch(tmp_path, update(None, tmp_path, model).index, model)
    answers = found.query(data.texts.captions, top_k=len(records))
    for hits, row in zip(answers, scores, strict=True):
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        by_name = [hit.score for hit in sorted(hits)]
        np.testing.assert_allclose(by_name, row, rtol=1e-6, atol=1e-6)


def test_an_image_is_a_clip_of_one_frame(workdir, model, folder):
    config = model.config
    frame = eval_view(noise(9)[:1], config.data.image_size)[None]
    vector = build_model(config).apply(
        {"params": load_params(workdir)[0]},
        jnp.asarray(frame),
        method=lambda model, video: model.embed_video(model.encode_video(video))[0, 0],
    )
    index = update(None, folder, model).index
    np.testing.assert_allclose(vectors(index)["still.png"], vector, rtol=1e-4, atol=1e-6)


def test_only_what_is_new_or_changed_is_embedded(model, folder, embedded):
    """And the result is what embedding everything gives."""
    first = update(None, folder, model)
    assert embedded == {2: 3, 1: 1}
    assert (first.num_kept, first.num_removed, first.num_others) == (0, 0, 1)

    embedded.clear()
    assert update(first.index, folder, model).num_kept == 4
    assert not embedded

    (folder / "a.mp4").write_bytes(noise_clip(5))  # changed
    (folder / "sub" / "c.mp4").unlink()
    (folder / "sub" / "d.mp4").write_bytes(noise_clip(6))
    second = update(first.index, folder, model)
    assert embedded == {2: 2}
    assert (second.num_kept, second.num_removed) == (2, 1)

    ours, fresh = vectors(second.index), vectors(update(None, folder, model).index)
    assert ours.keys() == fresh.keys() == {"a.mp4", "b.MP4", "sub/d.mp4", "still.png"}
    for name, vector in fresh.items():
        np.testing.assert_allclose(ours[name], vector, rtol=1e-4, atol=1e-6)
    assert not np.allclose(ours["a.mp4"], vectors(first.index)["a.mp4"], atol=1e-4)


def test_a_file_of_the_same_size_has_changed_if_its_time_has(model, folder, embedded):
    index = update(None, folder, model).index
    embedded.clear()
    os.utime(folder / "a.mp4", ns=(0, 1))
    assert update(index, folder, model).num_kept == 3
    assert embedded == {2: 1}


@pytest.mark.parametrize("changed", ["parameters", "frames"])
def test_another_checkpoint_embeds_all_again(
    workdir, model, folder, tmp_path, embedded, capsys, changed
):
    config, (params, step) = model.config, load_params(workdir)
    if changed == "parameters":
        params = jax.tree.map(lambda x: x * 1.01, params)
    else:
        config = override(config, {"data.eval.num_frames": 4})
    other = Model(config, params, step, load_tokenizer(workdir / "tokenizer"))
    first = open_folder(model, tmp_path, folder)
    embedded.clear()
    second = open_folder(other, tmp_path, folder)
    assert embedded.total() == 4
    assert f"the index was of {first.index.checkpoint}" in capsys.readouterr().err
    assert first.index.checkpoint != second.index.checkpoint

    embedded.clear()  # and it was stored in place of the other
    open_folder(other, tmp_path, folder)
    assert not embedded


def test_names_of_any_kind_and_links_that_lead_back(model, folder, tmp_path, monkeypatch, capsys):
    """A colon makes a URL of a name, and a link to a folder above shows all clips again."""
    for name in ("12:30:05.mp4", "data:x.mp4", os.fsdecode(b"caf\xe9.mp4")):
        (folder / name).write_bytes(noise_clip(1))
    (folder / "sub" / "up").symlink_to("..")
    (folder / "again").symlink_to("sub")
    monkeypatch.chdir(folder)
    found = open_folder(model, tmp_path, Path("."))
    assert len(found.index.files) == 7 and "7 clips" in capsys.readouterr().err
    answer(found, ["a query"], 7)
    assert r"caf\udce9.mp4" in capsys.readouterr().out.encode().decode()


def test_what_cannot_be_used_is_named_with_its_reason(model, folder, tmp_path, capsys):
    (folder / "cut.mp4").write_bytes(noise_clip(1)[:-600])
    (folder / "text.mp4").write_text("no video")
    (folder / "text.png").write_text("no image")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    for _ in range(2):  # they are tried again, and reported again
        found = open_folder(model, tmp_path, folder)
        assert len(found.index.files) == 4
        first, *lines = capsys.readouterr().err.splitlines()
        assert "4 clips" in first and "unusable: 4, files of other types: 1" in first
        reasons = dict(line.removeprefix("  cannot be used: ").split(": ", 1) for line in lines)
        assert reasons.keys() == {"cut.mp4", "text.mp4", "text.png", "gone.jpg"}
        assert reasons["text.mp4"].startswith("not a readable video")
        assert reasons["gone.jpg"] == "not a readable file: No such file or directory"


def test_an_interrupted_run_keeps_what_it_has(model, tmp_path, monkeypatch):
    """Saved now and then; the next run embeds the rest."""
    for seed in range(3):
        (tmp_path / f"{seed}.mp4").write_bytes(noise_clip(seed))
    small = override(model.config, {"data.eval_batch_size": 1})
    monkeypatch.setattr(model, "config", small)
    monkeypatch.setattr("vlmae.search.folder._SAVE_EVERY_BATCHES", 2)
    saved = []
    update_index(None, tmp_path, model, saved.append)
    assert [(len(block.added.files), block.replaces) for block in saved] == [(2, True), (1, False)]
    assert update(saved[0].added, tmp_path, model).num_kept == 2


def test_an_update_of_a_stored_index_adds_what_changed(model, folder, tmp_path, embedded):
    """A file for each update; removals alone are stored too, and 0.1.0's one file is taken over."""
    path = index_path(tmp_path, folder)
    first = open_folder(model, tmp_path, folder)
    facts = {"format": 1, "checkpoint": first.index.checkpoint, "files": first.index.files}
    shutil.rmtree(path)
    old = path.with_name(f"{path.name}.npz")
    np.savez(old, facts=json.dumps(facts), embeddings=first.index.embeddings)
    embedded.clear()
    open_folder(model, tmp_path, folder)
    assert not embedded and not old.exists() and len(block_paths(path)) == 1
    (folder / "sub" / "c.mp4").unlink()
    (folder / "sub" / "d.mp4").write_bytes(noise_clip(6))
    open_folder(model, tmp_path, folder)
    (folder / "a.mp4").unlink()
    last = open_folder(model, tmp_path, folder)
    assert embedded == {2: 1} and len(block_paths(path)) == 3
    assert vectors(last.index).keys() == {"b.MP4", "sub/d.mp4", "still.png"}
    assert load_index(path).files == last.index.files


def test_many_files_of_an_index_are_joined(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmae.search.command.MAX_BLOCKS", 1)
    open_folder(model, tmp_path, folder)
    (folder / "more.mp4").write_bytes(noise_clip(6))
    found = open_folder(model, tmp_path, folder)
    path = index_path(tmp_path, folder)
    assert len(block_paths(path)) == 1 and load_index(path).files == found.index.files


def run_search(*args: object) -> str | int | None:
    """The exit code or message of the command line in this process."""
    try:
        return main(["search", *map(str, args)])
    except SystemExit as end:
        return end.code


def test_the_command_line(workdir, folder, script_env):
    """Two queries, through the real entry point."""
    command = [sys.executable, "-m", "vlmae", "search", workdir, folder]
    queries = ["--query", "a red circle", "a blue star", "--top-k", "2"]
    done = subprocess.run(
        [*command, *queries], capture_output=True, text=True, env=script_env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "4 clips (4 embedded now)" in done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[3], len(lines)) == ("a red circle", "a blue star", 6)
    for line in lines[1:3] + lines[4:]:
        score, name = line.split("  at ")[0].split()
        assert -1 <= float(score) <= 1 and (folder / name).is_file()


def test_json_and_search_by_a_clip(workdir, model, folder, capsys):
    """A clip finds itself first; a text and a clip are a line of JSON each."""
    [clip, *_] = sorted(folder.rglob("*.mp4"))
    flags = ("--query", "a red circle", "--clip", clip, "--json", "--top-k", 3)
    assert run_search(workdir, folder, *flags) == 0
    by_text, by_clip = map(json.loads, capsys.readouterr().out.splitlines())
    assert by_text["query"] == "a red circle" and by_clip["query"] == str(clip)
    for found in (by_text, by_clip):
        cosines = [hit["cosine"] for hit in found["clips"]]
        assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)
        for hit in found["clips"]:
            assert Path(hit["path"]) == folder / hit["name"]
            is_video = hit["name"].endswith(".mp4")
            assert (hit["secs"] is not None) == is_video, "images have no time"
    own = model.embed_video([clip])[0]
    [self_hit] = [hit for hit in by_clip["clips"] if hit["path"] == str(clip)]
    assert self_hit["cosine"] == pytest.approx(np.linalg.norm(own), abs=1e-5)


def test_the_time_is_that_of_the_best_frame(workdir, model, folder):
    """Of two frames, a quarter and three quarters into the clip."""
    index = update(None, folder, model).index
    [hits] = FolderSearch(folder, index, model).query(["a red circle"], 10, times=True)
    text = model.embed_text(["a red circle"])[0]
    for hit in hits:
        if hit.secs is None:
            continue
        with decode.open_clip(folder / hit.name) as clip:
            secs = clip.info.duration_secs
        frames = model.embed_frames([folder / hit.name])[0] @ text
        assert hit.score == pytest.approx(frames.mean(), abs=1e-5)
        assert hit.secs == pytest.approx(secs * (0.25, 0.75)[frames.argmax()])


def test_a_page_has_captions_of_the_evaluation_to_try(workdir, tmp_path):
    known = [json.loads(x)["caption"] for x in (workdir / "retrieval.jsonl").open()]
    found = examples(workdir)
    assert 1 < len(found) <= 4 and {*found} <= {*known}
    assert examples(tmp_path) == []


def test_without_a_query_it_asks(workdir, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\na blue star\n\nunasked\n"))
    assert run_search(workdir, folder, "--top-k", 1) == 0
    out = capsys.readouterr().out
    assert out.count("query: ") == 3 and out.count("\n  ") == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("a ring"))  # the input ends
    assert run_search(workdir, folder) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query", " "], "error: the query is empty"),
        (["--top-k", "0"], "error: --top-k must be at least 1, not 0"),
        (["--serve", "--query", "a"], "error: --serve takes its queries in the page: not with"),
        (["--serve", "--json"], "error: --serve takes its queries in the page: not with"),
        (["--clip", "none.mp4"], "error: --clip none.mp4: no such file"),
        (["--serve"], 'error: --serve needs Gradio; install it with: pip install -e ".[search]"'),
    ],
)
def test_bad_arguments(workdir, folder, monkeypatch, flags, message):
    missing = flags == ["--serve"]
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None if missing else name)
    assert run_search(workdir, folder, *flags).startswith(message)


def test_bad_folders(workdir, tmp_path):
    (tmp_path / "empty").mkdir()
    no_file = run_search(workdir, tmp_path / "empty", "--query", "a")
    assert no_file == f"error: {tmp_path / 'empty'}: no usable video or image among its files"
    no_folder = run_search(workdir, tmp_path / "none", "--query", "a")
    assert no_folder == f"error: {tmp_path / 'none'}: no such folder"


def test_a_run_without_vtc_is_refused(workdir, folder, tmp_path):
    config = override(
        load_config(workdir / "config.json"), {"objectives.vtc": 0.0, "objectives.mlm": 1.0}
    )
    save_config(config, tmp_path / "config.json")
    message = run_search(tmp_path, folder, "--query", "a")
    assert message.startswith(f"error: {tmp_path} was trained without VTC (objectives.vtc=0)")
