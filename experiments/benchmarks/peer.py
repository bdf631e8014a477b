"""The same model in PyTorch, from the encoders, decoder and fusion layers of transformers.

ViT-MAE, its decoder, BERT and BERT's layers with cross-attention (the fusion of ALBEF and BLIP),
with scaled-dot-product attention. What transformers does not have (token pruning, frame selection,
MuLTI's samplers) comes from the PyTorch model that `vlmae.export` writes.

Random choices (masks, masked words, negatives) come with the batch, so that both sides use the
same; the peer spends no time on drawing them.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import PyTree
from safetensors.numpy import save_file
from torch import Tensor, nn

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.export import modeling_vlmae
from vlmae.export.modeling_vlmae import TextFeatures, VideoFeatures
from vlmae.models.embeddings import sincos_positions
from vlmae.models.pixel_decoder import num_decoded
from vlmae.weights.export_format import describe
from vlmae.weights.families import FAMILIES
from vlmae.weights.tensors import Tensors, write_tensors
from vlmae.weights.torch_names import to_torch


class TorchBatch(NamedTuple):
    """A batch, with all random choices of a training step."""

    video: Tensor  # uint8 [b t h w 3]
    text_ids: Tensor  # [b l]
    text_mask: Tensor  # [b l]
    kept_ids: Tensor  # [b t k], the visible patches, ascending
    paint_noise: Tensor  # [b t n], selects the removed patches to decode
    hidden_ids: Tensor  # [b l], the text with masked words
    hidden: Tensor  # [b l], True where MLM predicts the word
    other_text: Tensor  # [b], row of the hard negative text of each clip
    other_video: Tensor  # [b], row of the hard negative clip of each text
    question: tuple[Tensor, Tensor] | None  # MCM's texts, ids and mask [b q]
    answer: Tensor  # [b], position of the true caption
    asked: Tensor  # [b], False for a row without enough wrong captions


class Peer(modeling_vlmae.VideoLanguageModel):
    """The exported model with training losses; parts that transformers has come from there."""

    def __init__(self, config: ExperimentConfig, params: PyTree):
        """Build the model of a config with these parameters, in training mode."""
        config = override(  # the exported model prunes as in evaluation
            config,
            {"model.video.sparsify.eval_keep_rate": config.model.video.sparsify.keep_rate},
        )
        super().__init__(describe(config, params, 0))
        self.load_state_dict({name: torch.tensor(x) for name, x in to_torch(params).items()})
        video, self.target_ratio = config.model.video, config.model.pixel_decoder.target_ratio
        self.text_encoder = StockText(config, params)
        if config.model.fusion.kind == "cross_attention":
            self.fusion = StockFusion(config, params)
        if not video.sparsify.is_used:
            mae = stock_mae(config, params)
            self.video_encoder = StockVideo(getattr(mae, "vit", mae))
            if "pixel_decoder" in self.parts:
                self.pixel_decoder = StockPainter(mae.decoder)

    def forward(self, batch: TorchBatch) -> Tensor:
        """Sum the losses of the parts that the model has, each of weight 1."""
        video = self.encode_video(batch.video, batch.kept_ids)
        text = self.encode_text(batch.text_ids, batch.text_mask)
        total = self.contrast(video, text) + self.match_pairs(video, text, batch)
        total = total + self.find_words(video, batch)
        if "pixel_decoder" in self.parts:
            total = total + self.paint(video, batch)
        if batch.question is not None:
            logits = self.choose(video, self.encode_text(*batch.question))
            values = F.cross_entropy(logits.float(), batch.answer, reduction="none")
            total = total + mean_where(values, batch.asked)
        return total

    def encode_video(self, video: Tensor, kept_ids: Tensor) -> VideoFeatures:
        """Encode the patches at `kept_ids` [b t k]."""
        if not isinstance(self.video_encoder, StockVideo):
            return super().encode_video(video, kept_ids)
        layout = self.model_config["video"]["layout"]
        mean, std = (
            torch.tensor(layout[x], device=video.device) for x in ("pixel_mean", "pixel_std")
        )
        pixels = ((video.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
        return self.video_encoder(pixels, kept_ids)

    def fuse(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Fuse as in evaluation, but selected frames pass a straight-through gradient to scores."""
        choice = self.choose_frames(video, text)
        if choice is None:
            return self.fusion(text, video)
        kept = modeling_vlmae.keep_frames(video, choice.frames)
        chosen = F.one_hot(choice.frames, choice.scores.shape[1]).bool()
        elsewhere = chosen.any(dim=1, keepdim=True) & ~chosen
        swaps = choice.scores[:, None].masked_fill(elsewhere, -torch.inf).softmax(dim=2)
        swaps = (swaps - swaps.detach()).to(kept.tokens)

        def learn(kept: Tensor, frames: Tensor) -> Tensor:
            return kept + torch.einsum("bkt,bt...->bk...", swaps, frames.detach())

        tokens = learn(kept.tokens, video.tokens)
        frame_cls = learn(kept.frame_cls, video.frame_cls)
        return self.fusion(text, kept._replace(tokens=tokens, frame_cls=frame_cls))

    def contrast(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """VTC over the batch; all its clips differ."""
        logits = self.logits(video, text).float()
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def match_pairs(self, video: VideoFeatures, text: TextFeatures, batch: TorchBatch) -> Tensor:
        """VTM: each pair as it is, with a hard clip, and with a hard text, in one pass."""
        own = torch.arange(len(batch.video), device=batch.video.device)
        texts = rows(text, torch.cat([own, own, batch.other_text]))
        videos = rows(video, torch.cat([own, batch.other_video, own]))
        scores = self.match_head(self.fuse(videos, texts)[:, 0]).float()
        labels = (torch.arange(len(scores), device=own.device) < len(own)).long()
        return F.cross_entropy(scores, labels)

    def find_words(self, video: VideoFeatures, batch: TorchBatch) -> Tensor:
        """MLM."""
        logits = self.word_logits(video, self.encode_text(batch.hidden_ids, batch.text_mask))
        words = batch.text_ids.flatten().long()
        values = F.cross_entropy(logits.flatten(0, 1).float(), words, reduction="none")
        return mean_where(values, batch.hidden.flatten())

    def paint(self, video: VideoFeatures, batch: TorchBatch) -> Tensor:
        """MVM on patches normalized one by one."""
        target = self.patches(batch.video).float()
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        if self.target_ratio == 0:
            painted = self.decode_pixels(video)
        else:
            painted = self.pixel_decoder(video, self.painted_places(video, batch.paint_noise))
            target = modeling_vlmae.take(target, painted.patch_ids)
        removed = video.removed_mask.gather(2, painted.patch_ids)
        return mean_where((painted.pixels.float() - target).square().mean(dim=-1), removed)

    def painted_places(self, video: VideoFeatures, noise: Tensor) -> Tensor:
        """Patches to decode, ascending [b t s]: those of tokens, then removed ones by noise."""
        n, patch_ids = noise.shape[2], video.patch_ids
        visible = video.stage_patch_ids[0].shape[2]
        count = num_decoded(n, patch_ids.shape[2], visible, self.target_ratio)
        occupied = (patch_ids[..., None] == torch.arange(n, device=noise.device)).any(dim=2)
        order = torch.where(video.removed_mask, noise, 2.0).masked_fill(occupied, -1.0)
        return modeling_vlmae.best(-order, count)


def rows(features: NamedTuple, ids: Tensor) -> NamedTuple:
    """Take the given rows of every tensor in `features`."""
    return torch.utils._pytree.tree_map(lambda x: x[ids], features)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values where the mask is True."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


# --- parts of transformers, with the interface of the exported model's parts


class StockVideo(nn.Module):
    """ViT-MAE's encoder."""

    def __init__(self, vit: transformers.ViTMAEModel):
        """Wrap the encoder."""
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor, kept_ids: Tensor) -> VideoFeatures:
        """Features of normalized pixels [b t 3 h w] at the patches `kept_ids` [b t k]."""
        b, t, k = kept_ids.shape
        n = self.vit.embeddings.patch_embeddings.num_patches
        # The encoder keeps the patches of the lowest noise, in that order.
        rank = torch.arange(k, device=pixels.device) / n - 1
        noise = pixels.new_ones(b, t, n).scatter(2, kept_ids, rank.to(pixels).expand(b, t, k))
        output = self.vit(pixels.flatten(0, 1), noise=noise.flatten(0, 1))
        x = output.last_hidden_state.unflatten(0, (b, t))
        removed_mask = output.mask.bool().unflatten(0, (b, t))
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], (kept_ids,), removed_mask)


class StockPainter(nn.Module):
    """ViT-MAE's decoder."""

    def __init__(self, decoder: nn.Module):
        """Wrap the decoder."""
        super().__init__()
        self.decoder = decoder

    def forward(self, video: VideoFeatures) -> modeling_vlmae.PixelPrediction:
        """Predict the pixels of every patch."""
        b, t, n = video.removed_mask.shape
        x = torch.cat([video.frame_cls[:, :, None], video.tokens], dim=2).flatten(0, 1)
        order = video.removed_mask.flatten(0, 1).long().argsort(dim=1, stable=True)
        pixels = self.decoder(x, order.argsort(dim=1)).logits.unflatten(0, (b, t))
        return modeling_vlmae.PixelPrediction(
            pixels, torch.arange(n, device=x.device).expand(b, t, n)
        )


class StockText(nn.Module):
    """BERT's lower layers."""

    def __init__(self, config: ExperimentConfig, params: PyTree):
        """Build the layers with our parameters."""
        super().__init__()
        text = {"text_encoder": params["text_encoder"]}
        tensors = write_tensors(text, FAMILIES["bert"], config.model)
        options = bert_options(config, config.model.text.depth)
        self.bert = from_tensors(transformers.BertModel, options, tensors, add_pooling_layer=False)

    @property
    def embeddings(self) -> "StockText":
        """This module, which has the method `scores` of the exported embeddings."""
        return self

    def scores(self, x: Tensor) -> Tensor:
        """Multiply tokens with the word embeddings [b l v]."""
        return x @ self.bert.get_input_embeddings().weight.T

    def forward(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Encode token ids [b l]."""
        return TextFeatures(self.bert(ids, attention_mask=mask).last_hidden_state, mask)


class StockFusion(nn.Module):
    """BERT's layers with cross-attention, which need text and video of one width."""

    def __init__(self, config: ExperimentConfig, params: PyTree):
        """Build the layers with our parameters."""
        super().__init__()
        text = {"text_encoder": {"embeddings": params["text_encoder"]["embeddings"]}}
        tensors = write_tensors(text, FAMILIES["bert"], config.model)
        for i in range(config.model.fusion.depth):
            layer = fusion_layer(params["fusion"][f"block_{i}"])
            tensors |= {f"encoder.layer.{i}.{name}": x for name, x in layer.items()}
        options = bert_options(config, config.model.fusion.depth) | {
            "is_decoder": True,
            "add_cross_attention": True,
            "encoder_hidden_size": config.model.video.width,
        }
        bert = from_tensors(transformers.BertModel, options, tensors, add_pooling_layer=False)
        self.layers = bert.encoder.layer

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Let the text tokens attend to the tokens of all frames [b l d]."""
        x, context = text.tokens, video.tokens.flatten(1, 2)
        for layer in self.layers:
            x = layer(x, text.valid[:, None, None], encoder_hidden_states=context)
        return x


def fusion_layer(block: PyTree) -> Tensors:
    """Rename the tensors of a fusion layer to BERT's names."""
    parts = {"mlp/up": "intermediate.dense", "mlp/down": "output.dense"}
    parts["mlp_norm"] = "output.LayerNorm"
    for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
        parts |= {f"{ours}/{x}": f"{theirs}.self.{x}" for x in ("query", "key", "value")}
        parts[f"{ours}/out"] = f"{theirs}.output.dense"
        parts[f"{ours}_norm"] = f"{theirs}.output.LayerNorm"
    tensors = to_torch(block)
    return {
        f"{theirs}.{leaf}": tensors[f"{ours.replace('/', '.')}.{leaf}"]
        for ours, theirs in parts.items()
        for leaf in ("weight", "bias")
    }


def stock_mae(config: ExperimentConfig, params: PyTree) -> transformers.ViTMAEPreTrainedModel:
    """ViT-MAE with both of its halves, or without MVM the encoder alone."""
    family, video, decoder = FAMILIES["vit_mae"], config.model.video, config.model.pixel_decoder
    size = config.data.image_size
    found = {part: params[part] for part in ("video_encoder", "pixel_decoder") if part in params}
    tensors = write_tensors(found, family, config.model)
    tensors = {
        name if name.startswith("decoder.") else f"vit.{name}": x for name, x in tensors.items()
    }
    side = size // video.patch_size
    fixed = {"vit.embeddings.position_embeddings": video.width}
    if paints := "pixel_decoder" in params:
        fixed["decoder.decoder_pos_embed"] = decoder.width
    for name, width in fixed.items():
        tensors[name] = np.pad(sincos_positions(side, side, width), ((1, 0), (0, 0)))[None]
    options = family.published(video, size, 1) | {
        "mask_ratio": video.mask.ratio if video.mask.scheme != "none" else 0.0,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": 4 * decoder.width,
    }
    kind = transformers.ViTMAEForPreTraining if paints else transformers.ViTMAEModel
    model = from_tensors(kind, options, tensors)
    for name, parameter in model.named_parameters():  # the fixed ones are learned once loaded
        parameter.requires_grad_(not any(x.endswith(name) for x in fixed))
    return model


def bert_options(config: ExperimentConfig, depth: int) -> dict:
    """Sizes of a BERT like the text encoder, without dropout."""
    options = FAMILIES["bert"].published(config.model.text, 0, 0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return options | dropout | {"num_hidden_layers": depth}


def from_tensors(kind: type, options: dict, tensors: Tensors, **more) -> nn.Module:
    """Build a model of transformers with these tensors, named as in its files.

    Raises:
      ValueError: the model has parameters that are not among them.
    """
    with tempfile.TemporaryDirectory() as folder:
        kind.config_class(**options).save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model, loaded = kind.from_pretrained(
            folder, attn_implementation="sdpa", output_loading_info=True, **more
        )
    if loaded["missing_keys"]:
        raise ValueError(f"{kind.__name__} misses {sorted(loaded['missing_keys'])[:5]}")
    return model.train()
