"""Published families of encoders as tables: tensor names, conversions, and config fields.

A family is one table. A rule names a tensor of the file, the parameter it becomes, and the
conversion between both (`vlmae.weights.tensors`); it is read in both directions. Names are those
of files on the hub; "|" separates names that different libraries write, the first is the one we
write.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmae.config.model import TextEncoderConfig, TextLayout, VideoEncoderConfig, VitLayout

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"pixel_mean": VitLayout.pixel_mean, "pixel_std": VitLayout.pixel_std}
# hidden_act of a config.json -> ours
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Rule(NamedTuple):
    """A tensor and its parameter; {i} is a layer, {block} the encoder's block of that number."""

    theirs: str
    ours: str
    kind: str = "same"  # a key of `tensors.KINDS`
    only: str = ""  # value of `VitLayout.frame_cls` with which it is written; "" any


@dataclass(frozen=True)
class Family:
    """Storage format of one kind of published model.

    Attributes:
      part: "text" or "video".
      model_class: class of transformers that opens the folders that we write.
      prefix: prefix of the bare encoder's tensors in files of a whole model.
      rules: tensors that have a parameter.
      fields: converts its config.json to the fields of our encoder's config.
      published: converts our encoder's config, image size and frames of a clip to its config.json.
      defaults: values that its config.json may leave out, beside `BASE`.
      absent: biases of ours that it lacks; they are read as zero.
    """

    part: str
    model_class: str
    prefix: str
    rules: tuple[Rule, ...]
    fields: Callable[[dict], dict[str, Any]]
    published: Callable[[Any, int, int], dict[str, Any]]
    defaults: tuple[tuple[str, Any], ...] = ()
    absent: tuple[str, ...] = ()

    def complete(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Fill in the values that a config.json leaves out."""
        return BASE | dict(self.defaults) | hf


# Values of the base size, which a config.json may leave out.
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Make the rules for weight and bias of a dense layer."""
    weight, bias = pair(theirs, ours, "kernel")
    return weight._replace(kind="transpose"), bias


def norm(theirs: str, ours: str, only: str = "") -> tuple[Rule, Rule]:
    """Make the rules for scale and bias of a layer norm."""
    scale, bias = pair(theirs, ours, "scale")
    return scale._replace(only=only), bias._replace(only=only)


def pair(theirs: str, ours: str, leaf: str) -> tuple[Rule, Rule]:
    """Make the rules for `weight` and `bias` of a module, our parameters `leaf` and `bias`."""
    # Every alternative gets its ending, as libraries differ in modules and not in leaves.
    names = theirs.split("|")
    weight, bias = ("|".join(f"{name}.{end}" for name in names) for end in ("weight", "bias"))
    return Rule(weight, f"{ours}/{leaf}"), Rule(bias, f"{ours}/bias")


LAYER = "encoder.layer.{i}."


def attention(names: dict[str, str], block: str = "{block}") -> tuple[Rule, ...]:
    """Make the rules for the four projections, given their names in the file."""
    return sum((linear(theirs, f"{block}/attention/{n}") for n, theirs in names.items()), ())


def feed_forward(up: str, down: str, block: str = "{block}") -> tuple[Rule, ...]:
    """Make the rules for the two dense layers of an MLP."""
    return linear(up, f"{block}/mlp/up") + linear(down, f"{block}/mlp/down")


def vit_attention(layer: str, block: str = "{block}") -> tuple[Rule, ...]:
    """Make the rules for the projections in the ViTs of transformers."""
    inner = f"{layer}attention.attention."
    names = {name: f"{inner}{name}" for name in ("query", "key", "value")}
    return attention(names | {"out": f"{layer}attention.output.dense"}, block)


def vit_layer(layer: str = LAYER, block: str = "{block}") -> tuple[Rule, ...]:
    """Make the rules for a block of ViT, DeiT, ViT-MAE, BEiT and VideoMAE."""
    return (
        vit_attention(layer, block)
        + norm(f"{layer}layernorm_before", f"{block}/attention_norm")
        + norm(f"{layer}layernorm_after", f"{block}/mlp_norm")
        + feed_forward(f"{layer}intermediate.dense", f"{layer}output.dense", block)
    )


VIDEO = "video_encoder"
PATCHES = (
    Rule("embeddings.patch_embeddings.projection.weight", f"{VIDEO}/patch_embed/kernel", "conv"),
    Rule("embeddings.patch_embeddings.projection.bias", f"{VIDEO}/patch_embed/bias"),
)
CLS = (Rule("embeddings.cls_token", f"{VIDEO}/cls", "row"),)
POSITIONS = (Rule("embeddings.position_embeddings", f"{VIDEO}/positions", "rows"),)
FINAL_NORM = norm("layernorm", f"{VIDEO}/norm")


def sizes(hf: dict) -> dict[str, Any]:
    """Read the fields that nearly all configs share."""
    return {
        "width": hf["hidden_size"],
        "depth": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "mlp_dim": hf["intermediate_size"],
    }


def layer_fields(hf: dict) -> dict[str, Any]:
    """Read the fields of `VitLayout` and `TextLayout` that nearly all configs share."""
    return {"eps": hf["layer_norm_eps"], "activation": ACTIVATIONS[hf["hidden_act"]]}


def published_activation(activation: str) -> str:
    """Return the `hidden_act` that transformers reads as our activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def vit_fields(hf: dict, positions: str = "learned", **layout: Any) -> dict[str, Any]:
    """Read the fields of a ViT; the layout is MAE's but for the given fields."""
    # ViT and BEiT are trained on pixels in [-1, 1]; the others pass their own.
    layout = layer_fields(hf) | {"pixel_mean": HALF, "pixel_std": HALF} | layout
    fields = {"patch_size": hf["patch_size"], "positions": positions}
    return sizes(hf) | fields | {"layout": VitLayout(**layout)}


def vit_published(
    video: VideoEncoderConfig, image_size: int, _num_frames: int, **more: Any
) -> dict[str, Any]:
    """Write the config.json of a ViT, with more fields of its family."""
    return {
        "hidden_size": video.width,
        "num_hidden_layers": video.depth,
        "num_attention_heads": video.num_heads,
        "intermediate_size": video.mlp_dim,
        "patch_size": video.patch_size,
        "image_size": image_size,
        "layer_norm_eps": video.layout.eps,
        "hidden_act": published_activation(video.layout.activation),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    } | more


def text_fields(hf: dict, **layout: Any) -> dict[str, Any]:
    """Read the fields of a text encoder; the layout is BERT's but for the given fields."""
    words = {"vocab_size": hf["vocab_size"], "layout": TextLayout(**layer_fields(hf) | layout)}
    return sizes(hf) | words


def text_published(text: TextEncoderConfig) -> dict[str, Any]:
    """Write the config.json of a text encoder."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "intermediate_size": text.mlp_dim,
        "max_position_embeddings": text.max_len,
        "hidden_act": published_activation(text.layout.activation),
        "layer_norm_eps": text.layout.eps,
    }


# --- BERT, MiniLM

BERT_ATTENTION = {n: f"{LAYER}attention.self.{n}" for n in ("query", "key", "value")}
TABLES = {"word": "word_embeddings", "position": "position_embeddings"}
TABLES |= {"token_type": "token_type_embeddings"}
BERT = Family(
    part="text",
    model_class="BertModel",
    prefix="bert.",
    rules=(
        *(
            Rule(f"embeddings.{theirs}.weight", f"text_encoder/embeddings/{ours}/embedding")
            for ours, theirs in TABLES.items()
        ),
        *norm("embeddings.LayerNorm", "text_encoder/embeddings/norm"),
        *attention(BERT_ATTENTION | {"out": f"{LAYER}attention.output.dense"}),
        *norm(f"{LAYER}attention.output.LayerNorm", "{block}/attention_norm"),
        *feed_forward(f"{LAYER}intermediate.dense", f"{LAYER}output.dense"),
        *norm(f"{LAYER}output.LayerNorm", "{block}/mlp_norm"),
        *linear("cls.predictions.transform.dense", "word_transform/dense"),
        *norm("cls.predictions.transform.LayerNorm", "word_transform/norm"),
        Rule("cls.predictions.bias", "word_bias"),
    ),
    fields=text_fields,
    published=lambda text, _size, _frames: text_published(text) | {"type_vocab_size": 2},
)

# --- vision transformers

VIT = Family(
    part="video",
    model_class="ViTModel",
    prefix="vit.",
    rules=PATCHES + CLS + POSITIONS + vit_layer() + FINAL_NORM,
    fields=vit_fields,
    published=vit_published,
)
DEIT = Family(
    part="video",
    model_class="DeiTModel",
    prefix="deit.",
    rules=(*VIT.rules, Rule("embeddings.distillation_token", f"{VIDEO}/extra", "rows")),
    fields=lambda hf: vit_fields(hf, extra_tokens=1, **IMAGENET),
    published=vit_published,
)
MAE_DECODER = ("decoder.decoder_layers.{i}.", "decoder.decoder_encoder.layer.{i}.")
VIT_MAE = Family(
    part="video",
    model_class="ViTMAEModel",
    prefix="vit.",
    rules=(
        *(PATCHES + CLS + vit_layer() + FINAL_NORM),
        Rule("embeddings.position_embeddings", f"{VIDEO}/sincos", "fixed"),
        *linear("decoder.decoder_embed", "pixel_decoder/embed"),
        *(rule for layer in MAE_DECODER for rule in vit_layer(layer, "pixel_decoder/block_{i}")),
        *norm("decoder.decoder_norm", "pixel_decoder/norm"),
        *linear("decoder.decoder_pred", "pixel_decoder/pixels"),
        Rule("decoder.mask_token", "pixel_decoder/mask_token", "row"),
        Rule("decoder.decoder_pos_embed", "pixel_decoder/sincos", "fixed"),
    ),
    fields=lambda hf: vit_fields(hf, "sincos", **IMAGENET),
    # ViTMAEModel masks three quarters of the patches unless it is told otherwise.
    published=lambda video, *clip: vit_published(video, *clip, mask_ratio=0.0),
)
DINOV2 = Family(
    part="video",
    model_class="Dinov2Model",
    prefix="dinov2.",
    rules=(
        *(PATCHES + CLS + POSITIONS + FINAL_NORM + vit_attention(LAYER)),
        *norm(f"{LAYER}norm1", "{block}/attention_norm"),
        *norm(f"{LAYER}norm2", "{block}/mlp_norm"),
        *feed_forward(f"{LAYER}mlp.fc1", f"{LAYER}mlp.fc2"),
        Rule(f"{LAYER}layer_scale1.lambda1", "{block}/attention_scale"),
        Rule(f"{LAYER}layer_scale2.lambda1", "{block}/mlp_scale"),
    ),
    fields=lambda hf: vit_fields(
        # Its config.json gives the hidden width as a ratio.
        hf | {"intermediate_size": hf["hidden_size"] * hf["mlp_ratio"]},
        layer_scale=hf["layerscale_value"],
        **IMAGENET,
    ),
    published=lambda video, *clip: vit_published(
        video,
        *clip,
        mlp_ratio=video.mlp_dim // video.width,
        layerscale_value=video.layout.layer_scale,
        use_mask_token=False,
        use_swiglu_ffn=False,
    ),
    defaults=(
        ("layer_norm_eps", 1e-6),
        ("patch_size", 14),
        ("mlp_ratio", 4),
        ("layerscale_value", 1.0),
    ),
)
CLIP_LAYER = "encoder.layers.{i}."
CLIP_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
CLIP_BLOCKS = (
    *attention({n: f"{CLIP_LAYER}self_attn.{name}" for n, name in CLIP_ATTENTION.items()}),
    *norm(f"{CLIP_LAYER}layer_norm1", "{block}/attention_norm"),
    *norm(f"{CLIP_LAYER}layer_norm2", "{block}/mlp_norm"),
    *feed_forward(f"{CLIP_LAYER}mlp.fc1", f"{CLIP_LAYER}mlp.fc2"),
)
CLIP_TEXT = Family(
    part="text",
    model_class="CLIPTextModel",
    prefix="text_model.",
    rules=(
        Rule("embeddings.token_embedding.weight", "text_encoder/embeddings/word/embedding"),
        Rule("embeddings.position_embedding.weight", "text_encoder/embeddings/position/embedding"),
        *CLIP_BLOCKS,
        *norm("final_layer_norm", "text_encoder/norm"),
        Rule("text_projection.weight", "text_projection/dense/kernel", "transpose"),
        Rule("logit_scale", "temperature", "inverse_log"),
    ),
    fields=lambda hf: text_fields(hf, pre_norm=True, causal=True),
    published=lambda text, _size, _frames: text_published(text),
    # Those of CLIPTextConfig.
    defaults=(
        ("vocab_size", 49408),
        ("hidden_size", 512),
        ("num_attention_heads", 8),
        ("intermediate_size", 2048),
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "quick_gelu"),
    ),
    absent=("text_projection/dense/bias",),
)
CLIP = Family(
    part="video",
    model_class="CLIPVisionModel",
    prefix="vision_model.",
    rules=(
        Rule("embeddings.patch_embedding.weight", f"{VIDEO}/patch_embed/kernel", "conv"),
        Rule("embeddings.class_embedding", f"{VIDEO}/cls"),
        Rule("embeddings.position_embedding.weight", f"{VIDEO}/positions"),
        # Spelled like this in the published files.
        *norm("pre_layrnorm", f"{VIDEO}/input_norm"),
        *CLIP_BLOCKS,
        *norm("post_layernorm", f"{VIDEO}/norm"),
        Rule("visual_projection.weight", "video_projection/dense/kernel", "transpose"),
    ),
    fields=lambda hf: vit_fields(hf, input_norm=True, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD),
    published=vit_published,
    # Those of CLIPVisionConfig, which differ from ViT's.
    defaults=(("layer_norm_eps", 1e-5), ("patch_size", 32), ("hidden_act", "quick_gelu")),
    absent=(f"{VIDEO}/patch_embed/bias", "video_projection/dense/bias"),
)
# Its frame is the mean of the patches here, since our encoders have no pooling by attention.
SIGLIP = Family(
    part="video",
    model_class="SiglipVisionModel",
    prefix="vision_model.",
    rules=(
        Rule("embeddings.patch_embedding.weight", f"{VIDEO}/patch_embed/kernel", "conv"),
        Rule("embeddings.patch_embedding.bias", f"{VIDEO}/patch_embed/bias"),
        Rule("embeddings.position_embedding.weight", f"{VIDEO}/positions"),
        *CLIP_BLOCKS,
        *norm("post_layernorm", f"{VIDEO}/norm"),
    ),
    fields=lambda hf: vit_fields(hf, cls_token=False, frame_cls="mean"),
    published=lambda video, *clip: vit_published(video, *clip, vision_use_head=False),
    # Those of SiglipVisionConfig.
    defaults=(("layer_norm_eps", 1e-6), ("hidden_act", "gelu_pytorch_tanh")),
)
BEIT_TABLE = "relative_position_bias.relative_position_bias_table"
BEIT_RELATIVE = {
    "use_relative_position_bias": "layer",
    "use_shared_relative_position_bias": "shared",
}
BEIT = Family(
    part="video",
    model_class="BeitModel",
    prefix="beit.",
    rules=(
        *(PATCHES + CLS + POSITIONS + vit_layer()),
        # BeitModel keeps its last norm in the pooler if frames are means of their patches.
        *norm("layernorm", f"{VIDEO}/norm", only="token"),
        *norm("pooler.layernorm", f"{VIDEO}/norm", only="mean"),
        Rule(f"{LAYER}lambda_1", "{block}/attention_scale"),
        Rule(f"{LAYER}lambda_2", "{block}/mlp_scale"),
        Rule(f"{LAYER}attention.attention.{BEIT_TABLE}", f"{VIDEO}/relative_bias/block_{{i}}"),
        Rule(f"encoder.{BEIT_TABLE}", f"{VIDEO}/relative_bias/shared"),
    ),
    fields=lambda hf: vit_fields(
        hf,
        "learned" if hf.get("use_absolute_position_embeddings") else "none",
        layer_scale=hf["layer_scale_init_value"],
        relative_bias=next((kind for key, kind in BEIT_RELATIVE.items() if hf.get(key)), "none"),
        frame_cls="mean" if hf.get("use_mean_pooling", True) else "token",
    ),
    published=lambda video, *clip: vit_published(
        video,
        *clip,
        layer_scale_init_value=video.layout.layer_scale,
        use_absolute_position_embeddings=video.positions == "learned",
        use_mean_pooling=video.layout.frame_cls == "mean",
        use_mask_token=False,
        **{key: video.layout.relative_bias == kind for key, kind in BEIT_RELATIVE.items()},
    ),
    defaults=(("layer_scale_init_value", 0.1),),
    absent=("{block}/attention/key/bias",),
)
VIDEOMAE_INNER = f"{LAYER}attention.attention."
VIDEOMAE = Family(
    part="video",
    model_class="VideoMAEModel",
    prefix="videomae.",
    rules=(
        *(PATCHES[0]._replace(kind="conv3d"), PATCHES[1]),
        Rule(f"{VIDEOMAE_INNER}q_bias", "{block}/attention/query/bias"),
        Rule(f"{VIDEOMAE_INNER}v_bias", "{block}/attention/value/bias"),
        *vit_layer(),
        *norm("layernorm|fc_norm", f"{VIDEO}/norm"),  # the second in finetuned classifiers
    ),
    fields=lambda hf: vit_fields(
        hf,
        "sincos_clip",
        cls_token=False,
        frame_cls="mean",
        tubelet=hf["tubelet_size"],
        joint=True,
        **IMAGENET,
    ),
    published=lambda video, size, num_frames: vit_published(
        video,
        size,
        num_frames,
        num_frames=num_frames,
        tubelet_size=video.layout.tubelet,
        use_mean_pooling=False,  # with it, VideoMAEModel has no last norm
    ),
    defaults=(("tubelet_size", 2),),
    absent=("{block}/attention/key/bias",),
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "vit": VIT,
    "deit": DEIT,
    "vit_mae": VIT_MAE,
    "dinov2": DINOV2,
    "clip_vision_model": CLIP,
    "clip_text_model": CLIP_TEXT,
    "siglip_vision_model": SIGLIP,
    "beit": BEIT,
    "videomae": VIDEOMAE,
}
