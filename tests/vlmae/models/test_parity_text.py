"""Text encoder, fusion and word head against PyTorch, with the same random weights, in float32."""

import jax
import numpy as np
import torch
from torch_weights import (
    bert_embeddings,
    bert_layer,
    blocks,
    dense,
    norm,
    randomize,
    saved_weights,
)
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel, BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from vlmae.config.model import FusionConfig, ModelConfig, TextEncoderConfig
from vlmae.models.fusion import CrossAttentionFusion
from vlmae.models.heads import AnswerDecoder
from vlmae.models.text_encoder import TextEncoder, TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel

TOLERANCE = 1e-5
VOCAB, LENGTH, DEPTH = 90, 12, 3
OURS = TextEncoderConfig(
    vocab_size=VOCAB, max_len=LENGTH + 4, width=48, depth=DEPTH, num_heads=4, mlp_dim=80
)
THEIRS = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH + 4,
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "bos_token_id": 1,
    "sep_token_id": 2,
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(3, VOCAB, (4, LENGTH), dtype=np.int32)
MASK = np.arange(LENGTH) < np.array([[12], [7], [3], [1]])


def torch_model(kind: type, config, **options):
    """A PyTorch model for evaluation, with noise on all its weights."""
    model = kind(config, **options).eval()
    randomize(model)
    return model


def test_text_encoder_is_bert():
    reference = torch_model(BertModel, BertConfig(**THEIRS), add_pooling_layer=False)
    with torch.no_grad():
        output = reference(torch.tensor(IDS), attention_mask=torch.tensor(MASK, dtype=torch.int64))
    weights = saved_weights(reference)
    params = {
        "embeddings": bert_embeddings(weights, "embeddings"),
        **blocks(bert_layer, weights, "encoder.layer", DEPTH),
    }
    assert not weights, "every weight has its place"
    ours = jax.jit(TextEncoder(OURS).apply)({"params": params}, IDS, MASK)
    expected = output.last_hidden_state.numpy()
    np.testing.assert_allclose(ours.tokens[MASK], expected[MASK], rtol=0, atol=TOLERANCE)


def test_fusion_layers_are_blip():
    """BLIP's cross-attention follows each self-attention; the video may have another width."""
    config = BlipTextConfig(**THEIRS, is_decoder=True, encoder_hidden_size=40)
    reference = torch_model(BlipTextModel, config, add_pooling_layer=False)
    text = RNG.normal(size=(4, LENGTH, 48)).astype(np.float32)
    video = RNG.normal(size=(4, 2, 5, 40)).astype(np.float32)
    with torch.no_grad():
        output = reference(
            encoder_embeds=torch.tensor(text),
            attention_mask=torch.tensor(MASK, dtype=torch.int64),
            encoder_hidden_states=torch.tensor(video.reshape(4, 10, 40)),
            is_decoder=False,
        )
    weights = saved_weights(reference)
    params = blocks(bert_layer, weights, "encoder.layer", DEPTH)
    assert all(name.startswith("embeddings.") for name in weights)

    features = VideoFeatures(
        tokens=video,
        frame_cls=video[:, :, 0],
        stage_patch_ids=(np.zeros((4, 2, 5), np.int32),),
        removed_mask=np.zeros((4, 2, 9), bool),
    )
    fusion = CrossAttentionFusion(FusionConfig(depth=DEPTH), OURS)
    fused = jax.jit(fusion.apply)({"params": params}, TextFeatures(text, MASK), features)
    expected = output.last_hidden_state.numpy()
    np.testing.assert_allclose(fused[MASK], expected[MASK], rtol=0, atol=TOLERANCE)


def test_answer_decoder_is_berts():
    """The logits of every word, with fused questions of different lengths."""
    config = BertConfig(**THEIRS, is_decoder=True, add_cross_attention=True)
    reference = torch_model(BertLMHeadModel, config)
    fused = RNG.normal(size=(4, 9, 48)).astype(np.float32)
    valid = np.arange(9) < np.array([[9], [4], [1], [6]])
    with torch.no_grad():
        expected = reference(
            torch.tensor(IDS),
            encoder_hidden_states=torch.tensor(fused),
            encoder_attention_mask=torch.tensor(valid, dtype=torch.int64),
        ).logits.numpy()
    weights = saved_weights(reference)
    transform = "cls.predictions.transform"
    params = {
        "embeddings": bert_embeddings(weights, "bert.embeddings"),
        "word_transform": {
            "dense": dense(weights, f"{transform}.dense"),
            "norm": norm(weights, f"{transform}.LayerNorm"),
        },
        "word_bias": weights.pop("cls.predictions.bias"),
        **blocks(bert_layer, weights, "bert.encoder.layer", DEPTH),
    }
    assert not weights, "every weight has its place"
    decoder = AnswerDecoder(OURS, DEPTH)
    ours = jax.jit(decoder.apply)({"params": params}, IDS, fused, valid.sum(axis=1))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_word_head_is_berts():
    reference = torch_model(BertForMaskedLM, BertConfig(**{**THEIRS, "num_hidden_layers": 1}))
    fused = RNG.normal(size=(2, 5, 48)).astype(np.float32)
    with torch.no_grad():
        expected = reference.cls(torch.tensor(fused)).numpy()
    weights = saved_weights(reference)
    transform = "cls.predictions.transform"
    params = {
        "text_encoder": {"embeddings": bert_embeddings(weights, "bert.embeddings")},
        "word_transform": {
            "dense": dense(weights, f"{transform}.dense"),
            "norm": norm(weights, f"{transform}.LayerNorm"),
        },
        "word_bias": weights.pop("cls.predictions.bias"),
    }
    assert all(name.startswith("bert.encoder.") for name in weights)
    model = VideoLanguageModel(ModelConfig(text=OURS, dtype="float32"), image_size=16)

    def predict(params: dict, fused: np.ndarray):
        return model.apply({"params": params}, fused, method="predict_words")

    logits = jax.jit(predict)(params, fused)
    assert logits.shape == (2, 5, VOCAB)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
