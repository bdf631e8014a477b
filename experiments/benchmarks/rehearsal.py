"""SMAUG's recipe from published weights to the number, at full width: seconds, memory, disk.

    pip install -e ".[test]"                        # transformers and PyTorch
    python -m experiments.benchmarks.rehearsal

Every step is the command that a user gives, in a process of its own: the experiment files of
ViT-B/16 and BERT-base as they are, with a batch of four and a few training steps. The data are made
up, in the published forms of WebVid, CC3M, MSR-VTT and MSRVTT-QA; the weights are random, in
Hugging Face's layout of MAE (with its decoder of 8 x 512) and BERT. Stage 1 is killed after its
first checkpoint and run again. The same command goes on where it ended.
"""

import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro
from PIL import Image

from data_pipelines.media.video_writer import encode_video
from experiments.benchmarks.commands import Step, format_table, run_step
from experiments.benchmarks.report import print_report, write_report
from vlmae.models.embeddings import sincos_positions
from vlmae.runs.atomic_files import write_json

CLIPS, IMAGES, TEST_CLIPS = 16, 16, 8
COLORS = ("red", "green", "blue", "white", "black", "gray", "pink", "brown")
ANIMALS = ("dog", "cat", "horse", "bird")
CC3M_FILES = {"training": "Train_GCC-training", "validation": "Validation_GCC-1.1.0-Validation"}
WORDS = 30522  # of BERT's vocabulary
TINY = """
    --data.batch-size 4 --data.eval-batch-size 4 --data.num-workers 0 --model.dtype float32
    --train.log-every-steps 1 --train.save-every-steps 2
    --train.eval-every-epochs 0 --evaluation.pictures 0
""".split()


def steps(workdir: Path, train_steps: int) -> Iterator[Step]:
    """List the commands, in order."""
    python, data = sys.executable, ("--data-dir", str(workdir / "data"))
    vlmae = (python, "-m", "vlmae")
    for name in ("webvid_2m", "cc3m", "msrvtt_7k", "msrvtt_qa"):
        source = ("--manual-dir", str(workdir / "published" / name))
        words = (*vlmae, "prepare", name, *source, *data, "--allow-other-counts")
        yield Step(f"prepare {name}", words, workdir / "data" / name)
    common = (*TINY, "--train.steps", str(train_steps), "--data.data-dir", str(workdir / "data"))

    def train(
        name: str, words: Sequence[str], source: str = "", kill_at: Path | None = None
    ) -> Step:
        path = Path(__file__).parents[1] / "smaug" / words[0]
        given = (*words[1:], *common, "--workdir", str(workdir / name))
        if source:
            given += ("--train.init-from", str(workdir / source))
        return Step(name, (python, str(path), *given), workdir / name, kill_at)

    weights = workdir / "weights"
    first = [
        *("pretrain.py", "--train.init.video", str(weights / "mae")),
        *("--train.init.text", str(weights / "bert"), "--data.tokenizer", str(weights / "bert")),
    ]
    killed = train("stage1", first, kill_at=workdir / "stage1" / "checkpoints" / "2")
    yield dataclasses.replace(killed, name="stage1, killed")
    yield dataclasses.replace(train("stage1", first), name="stage1, resumed")
    yield train("stage2", ["pretrain_stage2.py"], source="stage1")
    rerank = ("--evaluation.rerank-top-k", "4")
    yield train("retrieval", ["retrieval.py", "msrvtt", *rerank], source="stage2")
    yield train("qa", ["qa.py", "msrvtt"], source="stage2")
    for format in ("torch", "stablehlo", "onnx"):
        made = f"export_{format}"
        words = (*vlmae, "export", str(workdir / "retrieval"), str(workdir / made))
        yield Step(f"export {format}", (*words, "--format", format), workdir / made)
    compared = (str(workdir / "retrieval"), str(workdir / "export_torch"), "--python", python)
    module = (python, "-m", "experiments.benchmarks.exported")
    yield Step("compare export", (*module, *compared, "--out-dir", str(workdir)))


def make_weights(folder: Path) -> None:
    """Write MAE's and BERT's bases with random values, and a vocabulary."""
    mae = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
    # Some releases of transformers leave MAE's fixed positions at zero.
    side, state = mae.config.image_size // mae.config.patch_size, mae.state_dict()
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        state[name][0, 1:] = torch.from_numpy(sincos_positions(side, side, state[name].shape[-1]))
    mae.save_pretrained(folder / "mae")
    transformers.BertForMaskedLM(transformers.BertConfig()).save_pretrained(folder / "bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [*special, *COLORS, *ANIMALS, "a", "runs", "what", "is", "it", "?"]
    rest = [f"[unused{i}]" for i in range(WORDS - len(known))]
    (folder / "bert" / "vocab.txt").write_text("\n".join([*known, *rest]) + "\n")


def make_data(folder: Path, rng: np.random.Generator) -> None:
    """Write made-up data sets in the published forms."""
    said = [f"a {COLORS[i % 8]} {ANIMALS[i // 8 % 4]} runs" for i in range(CLIPS + TEST_CLIPS)]
    train, held_out = said[:CLIPS], said[CLIPS:]

    def clip(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Smooth, as pictures are: noise is neither compressed nor decoded like them.
        small = rng.integers(0, 256, (24, 8, 10, 3), np.uint8)
        frames = [Image.fromarray(x).resize((320, 240), Image.Resampling.BICUBIC) for x in small]
        path.write_bytes(encode_video(np.stack([np.asarray(x) for x in frames]), fps=8))

    webvid = folder / "webvid_2m"
    for split, texts, first in (("train", train, 0), ("val", held_out, CLIPS)):
        rows = [f"{first + i},{text},1" for i, text in enumerate(texts)]
        for row in rows:
            clip(webvid / "videos" / "1" / f"{row.split(',')[0]}.mp4")
        table = "\n".join(["videoid,name,page_dir", *rows])
        (webvid / f"results_2M_{split}.csv").write_text(table + "\n")
    cc3m = folder / "cc3m"
    for split, name in CC3M_FILES.items():
        links = [f"http://example.com/{split}/{i}.jpg" for i in range(IMAGES)]
        pictures = cc3m / "images" / split
        pictures.mkdir(parents=True, exist_ok=True)  # of a run that ended here
        for i, link in enumerate(links):
            small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
            picture = small.resize((640, 480), Image.Resampling.BICUBIC)
            picture.save(pictures / f"{i}_{zlib.crc32(link.encode())}", "JPEG")
        rows = [f"{said[i]}\t{link}" for i, link in enumerate(links)]
        (cc3m / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    numbers = range(CLIPS + TEST_CLIPS)
    for name in ("msrvtt_7k", "msrvtt_qa"):
        for i in numbers:
            clip(folder / name / "videos" / f"video{i}.mp4")
    retrieval, questions = folder / "msrvtt_7k", folder / "msrvtt_qa"
    sentences = [{"caption": said[i], "video_id": f"video{i}", "sen_id": i} for i in numbers]
    write_json(retrieval / "MSRVTT_data.json", {"sentences": sentences})
    listed = ["video_id", *(f"video{i}" for i in range(CLIPS))]
    (retrieval / "MSRVTT_train.7k.csv").write_text("\n".join(listed) + "\n")
    tested = [f"{i},{i},video{i},{said[i]}" for i in numbers[CLIPS:]]
    table = "\n".join(["key,vid_key,video_id,sentence", *tested])
    (retrieval / "MSRVTT_JSFUSION_test.csv").write_text(table + "\n")
    for split in ("train", "val", "test"):
        chosen = numbers[:CLIPS] if split == "train" else numbers[CLIPS:]
        asked = [
            {"question": "what is it ?", "answer": ANIMALS[i // 8 % 4], "video_id": i, "id": i}
            for i in chosen
        ]
        write_json(questions / f"{split}_qa.json", asked)


def main(
    workdir: Path = Path("runs/rehearsal"),
    train_steps: int = 4,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table, and write rehearsal.md and rehearsal.json.

    Args:
      workdir: for data, weights, runs and exports: many copies of ViT-B/16 and BERT-base.
      train_steps: of every training.
      out_dir: where the table goes.
    """
    workdir = workdir.absolute()
    done = workdir / "done.json"
    if not done.exists():
        make_data(workdir / "published", np.random.default_rng(0))
        make_weights(workdir / "weights")
        write_json(done, [])
    rows = json.loads(done.read_text())
    for step in steps(workdir, train_steps):
        if step.name not in {row["step"] for row in rows}:
            rows.append(run_step(step, workdir / "logs", workdir))
            write_json(done, rows)
            print(json.dumps(rows[-1]), flush=True)
    settings = {"train_steps": train_steps, "batch_size": 4}
    write_report(out_dir, "rehearsal", format_table(rows), settings, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
