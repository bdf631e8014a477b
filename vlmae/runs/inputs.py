"""Files, frames and sentences as the arrays that a run's model takes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Bool, UInt8

from data_pipelines.loading.rows import load_video
from data_pipelines.media import decode, images, transforms
from data_pipelines.media.endings import is_image
from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.config import DataConfig
from data_pipelines.text.tokenize import Tokenizer
from vlmae.ops.multiple_choice import Caption


def read_clip(path: Path, config: DataConfig) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode the frames that evaluation would sample, resized and cropped to the run's size.

    Args:
      path: a video, or an image by its ending, which becomes a clip of one frame.
      config: of the run; `eval.num_frames`, `eval.backwards` and `image_size` are used.

    Raises:
      DecodeError: the file is missing, damaged or of another kind; the message leaves out its name.
    """
    if is_image(path):
        try:
            frames = images.decode_image(path.read_bytes())[None]
        except OSError as error:
            raise decode.DecodeError("not a readable file", error.strerror or "") from error
    else:
        # A path in place of bytes lets FFmpeg seek, so long files are not read whole.
        record = {"media": path, "media_type": b"video"}
        frames = load_video(record, config.eval.num_frames, rng=None)
    frames = frames[::-1] if config.eval.backwards else frames
    return transforms.eval_view(frames, config.image_size)


def as_frames(
    clip: str | Path | np.ndarray, config: DataConfig
) -> UInt8[np.ndarray, "t size size 3"]:
    """Read a clip from its path, or resize and crop frames that are given.

    Args:
      clip: a path, or uint8 frames [t h w 3] of any size, of which all are used.
      config: of the run.

    Raises:
      UserError: the file cannot be used, or the array is of another type or shape; names the file.
    """
    if isinstance(clip, str | Path):
        try:
            return read_clip(Path(clip).expanduser(), config)
        except decode.DecodeError as error:
            raise UserError(f"{clip}: {error}") from error
    frames = np.asarray(clip)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        found = f"{frames.dtype} {list(frames.shape)}"
        raise UserError(f"a clip is a path or uint8 frames [t h w 3], not {found}")
    return transforms.eval_view(frames, config.image_size)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, text_len: int) -> Caption:
    """Tokenize sentences to ids and mask [n text_len].

    Raises:
      UserError: `texts` is empty, or a single string in place of a list.
    """
    is_list = not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
    check(is_list and len(texts) > 0, "texts must be a list of at least one sentence")
    ids, mask = tokenizer.encode(texts, text_len)
    return Caption(ids, mask)  # type: ignore[arg-type]  # NumPy; jit takes it as well


def tokenize_options(
    options: Sequence[Sequence[str]], tokenizer: Tokenizer, text_len: int
) -> tuple[Caption, Bool[np.ndarray, "n c"]]:
    """Tokenize the options of each clip to ids and mask [n c text_len].

    Returns:
      The tokens, and True for options that were given: shorter lists are filled with empty texts.

    Raises:
      UserError: `options` is no list of lists of sentences, or one of them is empty.
    """
    nested = not isinstance(options, str) and not any(isinstance(given, str) for given in options)
    check(nested and len(options) > 0, "options must be a list of lists of sentences")
    counts = np.array([len(given) for given in options])
    check(counts.min() > 0, f"clip {counts.argmin()} has no option")
    count = int(counts.max())
    flat = [text for given in options for text in [*given, *[""] * (count - len(given))]]
    tokens = tokenize(flat, tokenizer, text_len)
    there = np.arange(count) < counts[:, None]
    ids, mask = (rearrange(x, "(n c) l -> n c l", c=count) for x in tokens)
    return Caption(ids, mask & there[..., None]), there
