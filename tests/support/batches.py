"""Batches of a config, and the smallest data set."""

import dataclasses
import io
import itertools

import numpy as np
from PIL import Image

from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.records import Batch, Example
from data_pipelines.storage.builders import base


def take(config, num_steps, start_step=0, **kwargs):
    with train_batches(config, start_step, **{"seed": 5, **kwargs}) as batches:
        return list(itertools.islice(batches, num_steps))


def with_split(config, split):
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, split=split))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for name in Batch._fields:
            x, y = getattr(a, name), getattr(b, name)
            if x is None:
                assert y is None
                continue
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)


class Stills(base.VideoTextBuilder):
    """Six one-colored images."""

    def examples(self):
        return {"train": (self._still(i) for i in range(6))}

    def _still(self, number):
        file = io.BytesIO()
        Image.new("RGB", (40, 32), (40 * number, 0, 255)).save(file, format="PNG")
        captions = [f"picture {number}"]
        return Example(file.getvalue(), "image", captions, f"still{number}", f"still/{number}")
