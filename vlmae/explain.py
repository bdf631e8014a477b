"""A picture of what a trained model does with any clip and caption.

python -m vlmae.explain WORKDIR --clip dog.mp4 --caption "a dog catches a ball"
"""

from pathlib import Path

import numpy as np

from data_pipelines import decode, rows, transforms
from data_pipelines.records import Batch
from data_pipelines.tokenize import load_tokenizer
from vlmae.analysis.picture import save_picture
from vlmae.checkpoint import load_params
from vlmae.command import run_command
from vlmae.config import ExperimentConfig
from vlmae.workdir import load_run, tokenizer_of


def explain(workdir: Path, clip: Path, caption: str, out: Path = Path("explained.png")) -> None:
    """Draws the frames, the mask, the patches that survive each stage, the frames chosen for the
    caption with their scores, and the reconstruction.

    Args:
      workdir: a run, or an export of one.
      clip: a video file, or an image where the run was trained on images alone.
      caption: the text for which frames are chosen.
      out: the PNG to write.

    Raises:
      FileNotFoundError: no such clip, config or checkpoint.
      ValueError: the caption is empty, or the clip cannot be decoded.
    """
    config = load_run(workdir)
    batch = load_pair(config, tokenizer_of(workdir), clip, caption)
    params, step = load_params(workdir)
    save_picture(config, params, batch, [caption], out)
    print(f"step {step}: written to {out}")


def load_pair(config: ExperimentConfig, tokenizer: Path, clip: Path, caption: str) -> Batch:
    """A batch of one pair, sampled and resized as in evaluation."""
    if not caption.strip():
        raise ValueError("the caption is empty")
    media, frames = clip.read_bytes(), config.data.eval.num_frames
    kind = b"image" if frames == 1 else b"video"
    try:
        video = rows.load_video({"media": media, "media_type": kind}, frames, rng=None)
    except decode.DecodeError as error:
        raise ValueError(f"{clip}: {error}") from error
    ids, mask = load_tokenizer(tokenizer).encode([caption], config.data.text_len)
    return Batch(
        video=transforms.eval_view(video, config.data.image_size)[None],
        text_ids=ids,
        text_mask=mask,
        media_ids=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
    )


if __name__ == "__main__":
    run_command(explain)
