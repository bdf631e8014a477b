"""The blocks of docs/guide/python.md, run one after the other like a notebook, on tiny runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from exported_models import CLASSES, FRAMES, config_with, params_with, random_clips, save_run

from data_pipelines.media.video_writer import encode_video

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "python.md"
QUESTIONS = {"data.task": "questions", "objectives.answer": 1.0}


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A folder with the runs and the videos that the page names."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    save_run(config_with({"name": "quickstart"}), Path("runs/quickstart"))
    params = params_with(QUESTIONS, without=("answer_decoder", "choice_head"))
    save_run(config_with(QUESTIONS), Path("runs/msvd_qa"), params)
    classes = {f"answer {i}": {"what": 1} for i in range(CLASSES)}
    Path("runs/msvd_qa/classes.json").write_text(json.dumps(classes))
    Path("videos").mkdir()
    for number, frames in enumerate(random_clips()):
        Path(f"videos/{number}.mp4").write_bytes(encode_video(frames, fps=4))
    return tmp_path


def test_the_page_runs(notebook, capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)

    assert repr(names["model"]).startswith("<vlmae.Model 'quickstart', step 7: embed_video, ")
    assert names["cosines"].shape == names["logits"].shape == (3, 2)
    np.testing.assert_allclose(names["probability"].sum(axis=0), 1, rtol=1e-6)
    assert names["scores"].shape == (2,) and names["choice"].scores.shape == (1, 3)
    assert names["answers"].scores.shape == (2, CLASSES) and len(set(names["top"])) == CLASSES
    assert names["features"].tokens.shape[:2] == (3, FRAMES)
    out = capsys.readouterr().out
    assert "run 'quickstart' cannot answer: trained without objectives.answer" in out
