"""The longest text of training, whatever the task reads."""

import dataclasses

import pytest
from batches import take, with_split

from data_pipelines.loading.evaluation import eval_data
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Example, Question
from data_pipelines.storage.build import build
from data_pipelines.storage.builders import base
from data_pipelines.storage.stored import tokenizer_for
from data_pipelines.storage.text_lengths import longest_text


class Asked(base.VideoTextBuilder):
    """Two stills; the longest option, by tokens, is wrong, and shorter in letters than another."""

    def __init__(self, *, still, **kwargs):
        super().__init__(**kwargs)
        self.still = still

    def examples(self):
        options = ("triangle", "a b c d")
        items = [
            Example(
                self.still, "image", ["a triangle"], str(i), f"{i}.png",
                questions=[Question("is it a triangle ?", "triangle", "", options)],
            )
            for i in range(2)
        ]  # fmt: skip
        return {"train": items}


def test_no_caption_of_that_length_is_cut(shapes_config):
    longest = longest_text(shapes_config, tokenizer_for(shapes_config))
    for length, cut in ((longest, False), (longest - 1, True)):
        data = eval_data(with_split(dataclasses.replace(shapes_config, text_len=length), "train"))
        assert bool(data.count_cut(data.texts.captions)) == cut


def test_no_option_of_that_length_is_cut(shapes_config, small_media, tmp_path):
    build(Asked(still=small_media[".png"], data_dir=tmp_path))
    source = SourceConfig("asked", "train", num_frames=1)
    config = dataclasses.replace(
        shapes_config, data_dir=str(tmp_path), train=(source,), eval=source, batch_size=2,
        task="options", num_others=1,
    )  # fmt: skip
    tokenizer = tokenizer_for(config)
    longest = longest_text(config, tokenizer)
    assert longest == tokenizer.longest(["is it a triangle ? a b c d"])
    [batch] = take(dataclasses.replace(config, text_len=longest + 3), 1)
    assert max(batch.text_mask.sum(1).max(), batch.other_mask.sum(2).max()) == longest
    assert longest_text(dataclasses.replace(config, task="questions", num_others=0), tokenizer) < 9
    assert longest_text(dataclasses.replace(config, task="captions"), tokenizer) == 4


@pytest.mark.parametrize("text_len", [1, 2])
def test_a_text_needs_a_word(text_len):
    with pytest.raises(UserError, match="less than 3"):
        DataConfig(text_len=text_len)
