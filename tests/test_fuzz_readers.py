"""Every reader of files, given damaged ones: an error that the user can read, or a value.

A file is damaged as disks do it (bits, cuts, zeros) or, if it is JSON, as strangers do it (another
type, a field too few or too many, nesting, numbers that do not fit).
"""

import contextlib
import dataclasses
import json
import random
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_experiment
from damage import damage, damage_json
from exported_models import WORDS, config_with, params_with
from safetensors.numpy import save_file

from data_pipelines.media.errors import DecodeError
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.classes import Classes, load_classes
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Question
from data_pipelines.storage import plan, stored
from data_pipelines.storage.builders import forms, parquet, readers, webdataset
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.shards import Shard, Workspace, Written
from data_pipelines.storage.shared_media import describe_shared
from data_pipelines.storage.tasks import Skipped, Task, TaskList, write_tasks
from data_pipelines.text.tokenize import Tokenizer, load_tokenizer
from vlmae.config.experiment import load_config
from vlmae.export.modeling_vlmae import VideoLanguageModel
from vlmae.launching.job_record import JobRecord, read_job, write_job
from vlmae.launching.status import find_statuses
from vlmae.runs import owner
from vlmae.runs.heartbeat import Beat, read_beats
from vlmae.runs.metric_writer import drop_later_lines, read_metrics
from vlmae.runs.newest import NewestMetrics
from vlmae.runs.result import read_result, write_result
from vlmae.runs.summary import find_runs
from vlmae.runs.workdir import check_data, note_data, save_config
from vlmae.search.index import Block, FileFacts, Index, load_index, save_block
from vlmae.weights.export_format import describe, read_description
from vlmae.weights.huggingface import open_published, read_folder
from vlmae.weights.torch_names import to_torch

SHARD, SPACE = Shard("train", 0, 1), "space/incomplete.1.0.0"
TRAIN = SourceConfig("shapes", "train")


def make_files(root: Path) -> None:
    """One good file of each kind."""
    make_run(root / "runs" / "one")
    prepare("shapes", root / "data", num_train=3, num_val=1, num_test=1, frame_size=16)
    make_workspace(Workspace(root / SPACE))
    make_weights(root)
    make_annotations(root / "annotations")
    files = tuple(FileFacts(f"{name}.mp4", 5, 7) for name in "abc")
    index = Index("run, step 1", files, np.ones((3, 4), np.float32))
    save_block(Block(index, ("old.mp4",), True), root / "index")


def make_run(run: Path) -> None:
    run.mkdir(parents=True)
    save_config(tiny_experiment.get_config(), run / "config.json")
    lines = [{"step": i, "loss/total": 0.5 * i, "speed/clips_per_sec": 3.0} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_result(run, 3, {"retrieval/t2v_r1": 50.0}, 8)
    write_job(run, JobRecord("local", "1", "host", "log", ("python", "x.py"), 5.0))
    beat = Beat(0, 1, "host", 1, "", 2, "training", 1.0, 2.0, 5.0, "")
    (run / "processes").mkdir()
    (run / "processes/0.json").write_text(json.dumps(dataclasses.asdict(beat)))
    (run / "owner").mkdir()
    (run / "owner/run.000001.json").write_text(
        json.dumps(dataclasses.asdict(owner.Owner("host", 1, "", 2, "python")))
    )
    note_data({"shapes/train": {"records": 3, "digest": "0"}}, run)
    Tokenizer.from_vocabulary([*WORDS, "a", "##b"]).save(run / "tokenizer")
    Classes({"yes": {"is": 2}, "no": {"is": 1}}).save(run)


def make_workspace(space: Workspace) -> None:
    space.work.mkdir(parents=True)
    request = {"builder": "Manifest", "inputs": {"a.jsonl": [1, 2]}}
    made = plan.Plan(request, 3, {"train": 3}, {"train": 1})
    (space.work / plan.PLAN_FILE).write_text(json.dumps(dataclasses.asdict(made)))
    skipped = Skipped("a.mp4", "without a caption")
    written = Written(3, 100, "0", (skipped,))
    space.mark(SHARD).write_text(json.dumps(dataclasses.asdict(written)))
    lines = [json.dumps(dataclasses.asdict(skipped)) + "\n"] * 3
    (space.work / plan.SKIPPED_FILE).write_text("".join(lines))
    question = Question("what?", "a", "x", ("a", "b"))
    tasks = [Task(f"{i}.mp4", 5, captions=("a dog",), questions=(question,)) for i in range(3)]
    write_tasks(space.work, "train", tasks, print)


def make_weights(root: Path) -> None:
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "image_size": 8}
    vit |= {"num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4}
    vit |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
    (root / "vit").mkdir()
    (root / "vit/config.json").write_text(json.dumps(vit))
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
    (root / "vit/preprocessor_config.json").write_text(json.dumps(pixels))
    save_file({"a": np.ones((4, 4), np.float32)}, root / "vit/part.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors"}}
    (root / "vit/model.safetensors.index.json").write_text(json.dumps(index))
    config, params = config_with({}), params_with({})
    (root / "export").mkdir()
    (root / "export/config.json").write_text(json.dumps(describe(config, params, 7)))
    save_file(to_torch(params), root / "export/model.safetensors", metadata={"format": "pt"})


def make_annotations(folder: Path) -> None:
    folder.mkdir()
    entries = [{"video": f"{i}.mp4", "caption": "a dog", "questions": [{"q": 1}]} for i in range(3)]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "table.csv").write_text("video,caption\n" + 'a.mp4,"a ""big"" dog"\n' * 3)
    with contextlib.closing(sqlite3.connect(folder / "annos.db")) as db:
        db.execute("CREATE TABLE annos (video TEXT, caption TEXT)")
        db.executemany("INSERT INTO annos VALUES (?, ?)", [("a.mp4", "a dog")] * 3)
        db.commit()
    media = pa.array(
        [{"bytes": b"x", "path": "x"}] * 3, pa.struct({"bytes": "binary", "path": "string"})
    )
    pq.write_table(pa.table({"image": media, "text": ["a", "b", "c"]}), folder / "set.parquet")
    (folder / "0.txt").write_text("a dog")
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "1.jpg", "1.json"):
            source = folder / ("0.txt" if name.endswith("txt") else "list.json")
            tar.add(source, name)


def read_all_records(root: Path) -> None:
    for split in ("train", "test"):
        source = SourceConfig("shapes", split)
        records = stored.open_source(source, root / "data")
        for i in range(len(records)):
            assert set(records[i]) >= {"media", "media_type", "source", "match_id", "captions"}
        assert all(text.captions is not None for text in stored.read_texts(source, root / "data"))
    stored.fingerprint(TRAIN, root / "data")
    describe_shared(DataConfig(train=(TRAIN,), data_dir=str(root / "data")))


def read_workspace(root: Path) -> None:
    space = Workspace(root / SPACE)
    plan.read_plan(space)
    space.read_mark(SHARD)
    list(plan.read_skipped(space.work / plan.SKIPPED_FILE))
    tasks = TaskList(space.work, "train")
    list(tasks.read(0, len(tasks)))


def read_run(root: Path) -> None:
    """A folder of runs: nothing in it may end these two."""
    find_statuses(root / "runs", 10.0)
    find_runs(root / "runs")


def on_run(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: read(root / "runs/one")


def read_tar(root: Path) -> None:
    list(webdataset.read_tar(root / "annotations/set.tar"))


RUN, PREPARED, NOTES = "runs/one", "data/shapes/1.1.0", "annotations"
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # pattern of the file, its reader
    "config": (f"{RUN}/config.json", on_run(lambda run: load_config(run / "config.json"))),
    "result": (f"{RUN}/result.json", on_run(read_result)),
    "metrics": (f"{RUN}/metrics.jsonl", on_run(read_metrics)),
    "newest metrics": (f"{RUN}/metrics.jsonl", on_run(lambda run: NewestMetrics(run).read())),
    "resumed metrics": (
        f"{RUN}/metrics.jsonl",
        on_run(lambda run: drop_later_lines(run / "metrics.jsonl", 2)),
    ),
    "heartbeat": (f"{RUN}/processes/0.json", on_run(read_beats)),
    "job": (f"{RUN}/job.json", on_run(read_job)),
    "owner": (f"{RUN}/owner/run.000001.json", on_run(owner.check_free)),
    "data": (f"{RUN}/data.json", on_run(lambda run: check_data({}, run, {}))),
    "status and report": (f"{RUN}/**/*.json*", read_run),
    "tokenizer": (
        f"{RUN}/tokenizer/tokenizer.json",
        on_run(lambda r: load_tokenizer(r / "tokenizer")),
    ),
    "vocabulary": (
        f"{RUN}/tokenizer/vocab.txt",
        on_run(lambda run: load_tokenizer(run / "tokenizer/vocab.txt")),
    ),
    "classes": (f"{RUN}/classes.json", on_run(lambda run: load_classes(run / "classes.json"))),
    "metadata": (f"{PREPARED}/*.json", read_all_records),
    "texts": (f"{PREPARED}/texts_*", read_all_records),
    "records": (f"{PREPARED}/*.array_record*", read_all_records),
    "preparation": (f"{SPACE}/work/*", read_workspace),
    "published": ("vit/*config.json", lambda root: open_published(str(root / "vit"))),
    "tensors": ("vit/*.safetensors*", lambda root: read_folder(root / "vit")),
    "export": ("export/config.json", lambda root: read_description(root / "export")),
    "torch": ("export/*", lambda root: VideoLanguageModel.from_folder(root / "export")),
    "index": ("index/*.npz", lambda root: load_index(root / "index")),
    "list": (
        f"{NOTES}/list.json",
        lambda root: list(readers.read_entries(root / NOTES / "list.json")),
    ),
    "lines": (
        f"{NOTES}/lines.jsonl",
        lambda root: list(readers.read_json_lines(root / NOTES / "lines.jsonl")),
    ),
    "table": (
        f"{NOTES}/table.csv",
        lambda root: list(readers.read_table(root / NOTES / "table.csv")),
    ),
    "sqlite": (
        f"{NOTES}/annos.db",
        lambda root: list(forms.READERS["sqlite"](root / NOTES / "annos.db")),
    ),
    "parquet": (
        f"{NOTES}/set.parquet",
        lambda root: list(parquet.read_tasks(root / NOTES / "set.parquet")),
    ),
    "tar": (f"{NOTES}/set.tar", read_tar),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_files(root)
    return root


def check_reader(name: str, files: Path, tmp_path: Path, seeds: range) -> None:
    """Damages one file for each seed; what is raised is one line that names it."""
    pattern, read = READERS[name]
    read(files)  # the good files
    for seed in seeds:
        rng, root = random.Random(f"{name} {seed}"), tmp_path / str(seed)
        folder = pattern.partition("/")[0]
        shutil.copytree(files / folder, root / folder)
        path = rng.choice(sorted(path for path in root.glob(pattern) if path.is_file()))
        if ".json" in path.suffix and rng.random() < 0.7:
            path.write_bytes(damage_json(path.read_text(), rng))
        else:
            damage(path, rng)
        try:
            read(root)
        except (UserError, FileNotFoundError, DecodeError) as error:
            named(error, path, root, seed)
        except ValueError as error:  # of the file that knows no class of ours
            assert name == "torch", (seed, path)
            named(error, path, root, seed)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {path}") from error
        shutil.rmtree(root)


def named(error: Exception, path: Path, root: Path, seed: int) -> None:
    """Checks that the message is a line with the file's name, or that of a folder it lies in."""
    text = str(error)
    assert path.name in text or f"{root}/" in text, (seed, path, text)
    assert "\n" not in text and len(text) < 1500, (seed, path, text)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_named(name, files, tmp_path):
    check_reader(name, files, tmp_path, range(10))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_10000_damaged_files_are_named(name, files, tmp_path):
    check_reader(name, files, tmp_path, range(10, 10 + -(-10_000 // len(READERS))))
