"""Operations of fusions and heads per text and clip: what `operations` counts, and what not."""

from data_pipelines.config import check
from vlmae.analysis.encoder_operations import Clip, text_layer, text_learns
from vlmae.analysis.products import (
    Context,
    Layer,
    Operations,
    added,
    attention,
    block,
    dense,
    feed_forward,
    pairs,
)
from vlmae.model_config import ModelConfig
from vlmae.models.pixel_decoder import num_decoded


def frame_selector(model: ModelConfig, clip: Clip) -> Operations:
    """The scores of a clip's frames for one text."""
    selector, frame, text = model.selector, model.video.width, model.text.width
    if selector.kind not in ("mlp", "transformer") or clip.times == 1:
        return Operations()
    if selector.kind == "mlp":
        return dense(clip.times, frame + text, frame) + dense(clip.times, frame, 1)
    width = selector.width
    layer = Layer(width, 4 * width, pre_norm=True)
    return added(
        dense(clip.times, frame, width),
        dense(1, text, width),
        block(layer, 1 + clip.times).times(selector.depth),
        dense(clip.times, width, 1),
    )


def fusion(model: ModelConfig, clip: Clip, length: int) -> Operations:
    """One text of `length` tokens with one clip."""
    kind, video, depth = model.fusion.kind, model.video.width, model.fusion.depth
    layer, learns = text_layer(model), text_learns(model)
    if kind == "cross_attention":
        context = Context(clip.read_times * clip.tokens, video)
        first = block(layer, length, context=context, upstream=learns)
        return first + block(layer, length, context=context).times(depth - 1)
    tokens = clip.read_times * (clip.tokens + 1)
    total = Operations() if video == layer.width else dense(tokens, video, layer.width)
    if kind == "concat":
        return total + block(layer, tokens + length).times(depth)
    return total + multiway(model, tokens, length)


def shared_by_texts(model: ModelConfig, clip: Clip) -> Operations:
    """What a fusion computes of a clip alone, once for all texts that meet it: keys and values.

    With the multiway fusion also the clip at the text's width, and what its latents start from.
    Nothing of it is shared where texts choose frames.
    """
    width, depth, kind = model.text.width, model.fusion.depth, model.fusion.kind
    if model.selector.kind != "none" and clip.times > 1:
        return Operations()
    if kind == "cross_attention":
        keys = dense(clip.read_times * clip.tokens, model.video.width, width).times(2 * depth)
        return keys.computed_again((model.remat == "full") * keys.forward)
    tokens = clip.read_times * (clip.tokens + 1)
    total = Operations() if model.video.width == width else dense(tokens, model.video.width, width)
    if kind == "concat":
        return total
    sampler, keys = model.fusion.sampler, dense(tokens, width, width).times(2 * depth)
    started = pooling(sampler.pooling, sampler.video_latents, tokens, width)
    return added(total, started, keys.computed_again((model.remat == "full") * keys.forward))


def multiway(model: ModelConfig, tokens: int, length: int) -> Operations:
    """A text and the `tokens` of a clip condensed to latents, then all of them together."""
    sampler, layer = model.fusion.sampler, text_layer(model)._replace(pre_norm=True)
    words, frames = sampler.text_latents, sampler.video_latents
    queries = frames + words * (sampler.guidance == "queries")
    source = tokens + words * (sampler.guidance == "context")
    ways = added(
        block(layer, words, source=length),
        block(layer, queries, source=source),
        block(layer, 1 + words + frames),
    )
    return added(
        pooling(sampler.pooling, words, length, layer.width, text_learns(model)),
        pooling(sampler.pooling, frames, tokens, layer.width),
        ways.times(model.fusion.depth),
    )


def pooling(kind: str, latents: int, tokens: int, width: int, upstream: bool = True) -> Operations:
    """What `latents` queries start from; `upstream`: the tokens take gradients."""
    if kind == "none":
        return Operations()
    if kind == "attention":
        return attention(latents, tokens, width, width)
    scores = {"block": 1, "global": latents, "mean": 0}[kind]
    mean = pairs(latents, tokens, width, gradients=upstream + (scores > 0))
    return dense(tokens, width, scores) + mean


def fused_length(model: ModelConfig, length: int) -> int:
    """Tokens that a fusion makes of a text of `length` tokens and a clip."""
    sampler = model.fusion.sampler
    latents = 1 + sampler.text_latents + sampler.video_latents
    return latents if model.fusion.kind == "multiway" else length


def match_head(model: ModelConfig) -> Operations:
    """Whether one text and clip belong together."""
    return dense(1, model.text.width, 2)


def word_head(model: ModelConfig, length: int) -> Operations:
    """The hidden words of a text of `length` tokens: a score of every word at each place.

    Words that the multiway fusion has condensed are read back first. The output table is that of
    the text encoder's embeddings, and frozen with them.
    """
    text, layer = model.text, text_layer(model)
    total = output_words(model, length, learned=text.adapter.frozen_blocks == 0)
    if model.fusion.kind != "multiway":
        return total
    latents = fused_length(model, length)
    read = attention(length, latents, text.width, text.width)
    return total + read + feed_forward(layer, length)


def output_words(model: ModelConfig, length: int, learned: bool = True) -> Operations:
    """BERT's transform and the product with the word table, which may be `learned`.

    Raises:
      ValueError: the size of the vocabulary is not known yet.
    """
    width, vocabulary = model.text.width, model.text.vocab_size
    check(vocabulary > 0, "model.text.vocab_size is 0: the tokenizer gives it at the start")
    return dense(length, width, width) + dense(length, width, vocabulary, learned=learned)


def pixel_decoder(model: ModelConfig, clip: Clip) -> Operations:
    """The patches of a clip that are decoded, [CLS] leading those of each frame."""
    decoder, video = model.pixel_decoder, model.video
    width, ratio = decoder.width, decoder.target_ratio
    layer = Layer(width, 4 * width, pre_norm=True, remat=model.remat)
    decoded = num_decoded(clip.patches, clip.tokens, clip.visible, ratio) if ratio else clip.patches
    return added(
        dense(clip.tokens + 1, video.width, width),
        block(layer, decoded + 1).times(decoder.depth),
        dense(decoded, width, video.patch_pixels),
    ).times(clip.times)


def classifier(model: ModelConfig) -> Operations:
    """The answers or labels that are told apart.

    Raises:
      ValueError: their number is not known yet.
    """
    width, classes = model.text.width, model.num_classes
    check(classes > 0, "model.num_classes is 0: the data give it at the start")
    return dense(1, width, 2 * width) + dense(1, 2 * width, classes)


def answer_decoder(model: ModelConfig, length: int, answer_len: int) -> Operations:
    """The words after each but the last of an answer, from a fused question of `length` tokens."""
    context = Context(fused_length(model, length), model.text.width)
    layers = block(text_layer(model), answer_len - 1, context=context).times(model.answer_depth)
    return layers + output_words(model, answer_len - 1)
