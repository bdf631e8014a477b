"""Picture of a trained model's masks, selected frames and reconstruction for any clip and caption.

vlmae explain WORKDIR dog.mp4 "a dog catches a ball"
"""

from pathlib import Path

import numpy as np

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.records import Batch
from data_pipelines.text.tokenize import load_tokenizer
from vlmae.config.experiment import ExperimentConfig
from vlmae.figures.clip_figure import save_picture
from vlmae.runs.checkpoint import load_params
from vlmae.runs.inputs import as_frames, tokenize
from vlmae.runs.load import load_run, title_of, tokenizer_of


def explain(workdir: Path, clip: Path, caption: str, out: Path = Path("explained.png")) -> None:
    """Draw how a trained model processes a clip and a caption.

    The picture shows the frames, the visible patches, the patches kept by each pruning stage, the
    frames selected for the caption with their scores, and the reconstruction.

    Args:
      workdir: a run, or an export of one.
      clip: a video, or an image.
      caption: the text for which frames are selected.
      out: the PNG to write.

    Raises:
      MissingError: no config or checkpoint.
      UserError: the caption is empty, or the clip cannot be read.
    """
    config = load_run(workdir)
    # The pair before the checkpoint: a bad path shows at once.
    batch = load_pair(config, tokenizer_of(workdir), clip, caption)
    params, step = load_params(workdir)
    save_picture(config, params, batch, [caption], out)
    print(f"{title_of(config, step)}: written to {out}")


def load_pair(config: ExperimentConfig, tokenizer: Path, clip: Path, caption: str) -> Batch:
    """Make a batch of one pair, sampled and resized as in evaluation.

    Raises:
      UserError: the caption is empty, or the clip cannot be read; names it.
    """
    if not caption.strip():
        raise UserError("the caption is empty")
    if not clip.is_file():
        raise MissingError(f"{clip}: no such file")
    text = tokenize([caption], load_tokenizer(tokenizer), config.data.text_len)
    return Batch(
        video=as_frames(clip, config.data)[None],
        text_ids=text.ids,
        text_mask=text.mask,
        media_ids=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
    )
