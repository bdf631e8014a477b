"""At which times of a clip frames are taken."""

import numpy as np
from jaxtyping import Float64


def segment_times(
    duration_secs: float, num_frames: int, rng: np.random.Generator | None = None
) -> Float64[np.ndarray, " t"]:
    """Draw one time in each of `num_frames` equal segments, ascending, in seconds.

    Random within the segment for training, its middle without `rng` for evaluation (temporal
    segment networks, Wang et al. 2016, section 3.1; the sampling of SMAUG and MuLTI).
    """
    offsets = np.full(num_frames, 0.5) if rng is None else rng.random(num_frames)
    return (np.arange(num_frames) + offsets) * duration_secs / num_frames
