"""Operations of a training step per clip, counted by formula, for any config.

Counted are the matrix products, two operations for each multiplication with its addition: dense
layers, attention, pooling, similarities, word and pixel outputs; forward, backward, and what is
computed again for the backward pass. Not counted is what works element by element (norms, softmax,
activations, dropout, losses), what moves data (gathers, embedding tables, their interpolation),
the optimizer, and the attention weights that cuDNN's kernel computes again in its backward pass.

Products whose results nobody uses are not counted either: the compiler leaves them out. So are the
similarities that VTM mines by where VTC has computed them. The gradient of BEiT's attention biases
in a frozen first block (inline adapters) is left out.

`python -m vlmae.analysis.operations DIR` prints the table of a run.
"""

from pathlib import Path
from typing import NamedTuple

from data_pipelines.config import check
from vlmae.analysis.encoder_operations import (
    Clip,
    clip_shape,
    temporal_blocks,
    text_encoder,
    text_learns,
    video_encoder,
)
from vlmae.analysis.fusion_operations import (
    answer_decoder,
    classifier,
    frame_selector,
    fusion,
    match_head,
    pixel_decoder,
    shared_by_texts,
    word_head,
)
from vlmae.analysis.products import Operations, added, dense, pairs
from vlmae.choices import SLOT
from vlmae.command import run_command
from vlmae.config import ExperimentConfig, load_config

VTM_PAIRS = 3  # as it is, with another video, with another text


class Texts(NamedTuple):
    """Texts that go through the encoder or the fusion together with a clip."""

    count: int
    length: int  # tokens of each


def step_operations(config: ExperimentConfig, num_frames: int) -> dict[str, Operations]:
    """Operations of a training step per clip of `num_frames` frames, by part of the model.

    Raises:
      ValueError: the config was not completed from its data (vocabulary, classes, template).
    """
    model, clip, fused = config.model, clip_shape(config, num_frames), fused_texts(config)
    parts = {
        "video encoder": video_encoder(model, clip),
        "temporal blocks": temporal_blocks(model, clip),
        "text encoder": added(
            *(text_encoder(model, length).times(count) for count, length in encoded_texts(config))
        ),
        "similarities": similarities(config, clip),
        "first pass for VTC": first_pass(config, clip),
        "frame selector": frame_selector(model, clip).times(
            sum(texts.count for texts in fused.values())
        ),
    }
    for name, (count, length) in fused.items():
        parts[f"fusion for {name}"] = fusion(model, clip, length).times(count)
        if name.startswith("vtm"):  # its texts meet a clip together
            parts[f"fusion for {name}"] += shared_by_texts(model, clip).times(1 - count)
    parts |= heads(config, clip)
    return {name: operations for name, operations in parts.items() if operations.total}


def operations_per_clip(config: ExperimentConfig, num_frames: int) -> int:
    """All operations of a training step, per clip of `num_frames` frames."""
    return added(*step_operations(config, num_frames).values()).total


def encoded_texts(config: ExperimentConfig) -> list[Texts]:
    """The passes of the text encoder."""
    objectives, length = config.objectives, config.data.text_len
    captions = bool(objectives.mlm) + objectives.reads_caption
    return [Texts(captions, length)] + ([option_texts(config)] if objectives.mcm else [])


def fused_texts(config: ExperimentConfig) -> dict[str, Texts]:
    """The passes of the fusion: by the objectives that read it, what it fuses with a clip."""
    objectives, length = config.objectives, config.data.text_len
    names = [name for name in ("vtm", "mlm") if getattr(objectives, name)]
    shares_pair = objectives.vtm and not objectives.reads_caption  # MLM's text is VTM's right one
    count = VTM_PAIRS * bool(objectives.vtm) + bool(objectives.mlm and not shares_pair)
    texts = {" and ".join(names): Texts(count, length)} if names else {}
    texts |= {"mcm": option_texts(config)} if objectives.mcm else {}
    once = {name: Texts(1, length) for name in ("answer", "label") if getattr(objectives, name)}
    return texts | once


def option_texts(config: ExperimentConfig) -> Texts:
    """The texts of a question of MCM: each option alone, or all of them in one."""
    objectives, length = config.objectives, config.data.text_len
    count, template = objectives.mcm_template.count("{}"), objectives.mcm_template_ids
    if objectives.mcm_kind == "score":
        return Texts(count, length)
    check(bool(template), "objectives.mcm_template_ids is empty: the tokenizer fills it")
    fixed = len(template) - template.count(SLOT)
    words = min((objectives.mcm_len - fixed) // count, length - 2)
    return Texts(1, fixed + count * words)


def similarities(config: ExperimentConfig, clip: Clip) -> Operations:
    """VTC: frames and text into the shared space, and the clip against all texts."""
    if not config.objectives.vtc:
        return Operations()
    return projections(config, clip) + pairs(1, config.data.batch_size, config.model.embed_dim)


def projections(config: ExperimentConfig, clip: Clip) -> Operations:
    """Frames and text into the shared space."""
    model, embed_dim = config.model, config.model.embed_dim
    return added(
        dense(clip.times, model.video.width, embed_dim),
        dense(1, model.text.width, embed_dim, upstream=text_learns(model)),
    )


def first_pass(config: ExperimentConfig, clip: Clip) -> Operations:
    """A batch in parts is encoded once more, for the embeddings that VTC compares."""
    if not config.objectives.vtc or config.optim.accumulate_steps == 1:
        return Operations()
    encoded = added(
        video_encoder(config.model, clip),
        temporal_blocks(config.model, clip),
        # Together with the masked caption, so that dropout is the same.
        text_encoder(config.model, config.data.text_len).times(encoded_texts(config)[0].count),
        projections(config, clip),
    )
    return Operations(again=encoded.forward)


def heads(config: ExperimentConfig, clip: Clip) -> dict[str, Operations]:
    """What follows the fusion, and the pixel decoder."""
    model, objectives, length = config.model, config.objectives, config.data.text_len
    decodes = objectives.answer_kind == "decoder"
    parts = {}
    if objectives.vtm:
        parts["matching head"] = match_head(model).times(VTM_PAIRS)
    if objectives.mlm:
        parts["word head"] = word_head(model, length)
    if objectives.mvm:
        parts["pixel decoder"] = pixel_decoder(model, clip)
    if objectives.mcm:
        parts["choice head"] = choice_head(config)
    if objectives.label or (objectives.answer and not decodes):
        parts["classifier"] = classifier(model)
    if objectives.answer and decodes:
        parts["answer decoder"] = answer_decoder(model, length, config.data.answer_len)
    return parts


def choice_head(config: ExperimentConfig) -> Operations:
    """The place of the true option, or one score for each option."""
    count = config.objectives.mcm_template.count("{}")
    return dense(1, config.model.text.width, count)


def operations_table(parts: dict[str, Operations]) -> str:
    """Markdown: millions of operations by part, and their sum."""
    lines = ["| part | forward | backward | forward again | million operations |"]
    lines.append("|---|---|---|---|---|")
    for name, operations in (parts | {"total": added(*parts.values())}).items():
        figures = [f"{count / 1e6:,.2f}" for count in (*operations, operations.total)]
        lines.append(f"| {' | '.join([name, *figures])} |")
    return "\n".join(lines)


def show(directory: Path) -> None:
    """Prints the operations of a run for every length of its training clips.

    Args:
      directory: the run's work directory.
    """
    config = load_config(directory / "config.json")
    for num_frames in sorted({source.num_frames for source in config.data.train}):
        print(f"A clip of {num_frames} frames:\n")
        print(operations_table(step_operations(config, num_frames)) + "\n")


if __name__ == "__main__":
    run_command(show)
