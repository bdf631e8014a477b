"""A run says what it will do, and what its objectives do, on the console."""

import sys

import tiny_experiment

from vlmae.cli.run_experiment import resolve
from vlmae.config.tree import override
from vlmae.training.overview import describe_run


def test_what_a_run_will_do(tiny_config):
    changes = {
        "data.eval.split": "test[:5]",
        "train.phases": [{"share": 0.5, "mask_ratio": 0.75}, {"share": 0.5}],
        "data.batch_size": 64,
    }
    config, _, _ = resolve(override(tiny_config, changes))
    training, evaluation, model, steps, note = describe_run(config)
    assert training == "training: shapes/train, 48 clips, 144 captions"
    assert evaluation == "evaluation: shapes/test[:5], 5 clips, 5 captions"
    assert model.startswith("model: 0.0") and "million parameters (" in model
    assert steps == "steps: 8 of 64 clips, 3.56 epochs; 2 training programs to compile"
    assert note.startswith("note: --data.batch-size=64 is more than the 48 clips of shapes/train")


def test_the_console_of_a_run(tiny_data_dir, tmp_path, monkeypatch, capsys):
    flags = [f"--data.data-dir={tiny_data_dir}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--train.steps=2", "--train.eval-every-steps=1"]
    monkeypatch.setattr(sys, "argv", ["tiny.py", *flags])
    tiny_experiment.main(tiny_experiment.get_config)
    lines = capsys.readouterr().out.splitlines()

    def place(beginning):
        return next(i for i, line in enumerate(lines) if line.startswith(beginning))

    cost = place("compiling the step for video (8, 2, 16, 16, 3): ")
    assert place("training: ") < place("steps: 2 of 8 clips") < cost
    assert "GFLOPs a clip" in lines[cost] and cost < place("compiled the step for video")
    losses = lines[place("step 1/2") + 1]
    assert all(f"{name} " in losses for name in ("vtc", "vtm", "mlm", "mvm"))
    assert losses.count("(right") == 3 and "%, a guess 67)" in losses
    assert lines[place("step 1: text to video R@1")].count("a guess: ") == 4
