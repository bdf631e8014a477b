"""Prepared data that one may only read: no lock, no cache, no other file is written."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CODE = """
import os, sys
from data_pipelines.loading.evaluation import eval_data
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import fingerprint

def use(folder):
    source = SourceConfig("shapes", num_frames=2)
    config = DataConfig(train=(source,), data_dir=folder, batch_size=4, image_size=32, text_len=8)
    print(prepare("shapes", folder))
    with train_batches(config, 0, seed=0) as batches:
        assert next(batches).valid.all()
    assert len(fingerprint(source, folder)) == 32
    print(eval_data(config).num_clips)

folder, writable = sys.argv[1:]
use(writable)  # imports what is imported late: another user may not read this environment
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    open(f"{folder}/file", "w")
    raise SystemExit("the folder can be written: nothing is tested")
except OSError:
    pass
use(folder)
"""


@pytest.fixture
def read_only(shapes_dir):
    # Not below pytest's own folder, into which no other user can look.
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "data"
        shutil.copytree(shapes_dir, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        os.chmod(made, 0o755)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_they_are_read(read_only, shapes_dir):
    before = sorted(read_only.rglob("*"))
    arguments = [str(read_only), str(shapes_dir)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, prepared, clips = done.stdout.split()
    assert Path(prepared).parent == read_only / "shapes" and clips == "10"
    assert sorted(read_only.rglob("*")) == before
