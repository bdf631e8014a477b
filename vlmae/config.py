"""An experiment as data: frozen dataclasses, checked when made, kept as JSON.

Field docstrings become the `--help` text. A ratio is always the fraction removed.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.config import DataConfig, check
from vlmae.config_tree import check_values, from_dict
from vlmae.files import write_whole
from vlmae.model_config import ModelConfig


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the training objectives; 0 switches one off."""

    vtc: float = 1.0
    """Video-text contrastive learning."""
    vtm: float = 1.0
    """Video-text matching with hard negatives."""
    mlm: float = 1.0
    """Masked language modeling on the fused text."""
    mvm: float = 1.0
    """Masked visual modeling: reconstruction of the removed patches."""
    mcm: float = 0.0
    """Multiple choice modeling: the true caption among others (MuLTI)."""
    answer: float = 0.0
    """Question answering; the text is the question."""
    answer_kind: Literal["classifier", "decoder"] = "classifier"
    """classifier: one class for each answer (MuLTI); decoder: the answer word by word, and the
    answers of the classes ranked by their probability (SMAUG)."""
    label: float = 0.0
    """Multi-label classification: every class on its own (MuLTI)."""
    mlm_ratio: float = 0.5
    """Fraction of the words that masked language modeling hides."""
    mask_text_for: Literal["mlm", "all"] = "mlm"
    """all: VTC and VTM read the masked text too, which spares one pass of the text encoder."""
    vtc_scope: Literal["global", "local"] = "global"
    """Where the negatives of VTC come from: the global batch, or each device's own rows."""
    vtm_scope: Literal["global", "local"] = "local"
    """The same for VTM; with local, no video tokens cross the network."""
    mcm_kind: Literal["concat", "score"] = "concat"
    """concat: all options in one text, the place of the truth is the answer; score: each caption is
    scored alone."""
    mcm_template: str = "what does the video describe? [SEP] (a) {} (b) {} (c) {} (d) {}"
    """The question and its options; their number holds for both kinds."""
    mcm_template_ids: tuple[int, ...] = ()
    """The template's token ids, -1 for an option; filled from the tokenizer at the start."""
    mcm_len: int = 128
    """Tokens of the longest text of a question; options are cut to fit."""

    def __post_init__(self):
        names = ("vtc", "vtm", "mlm", "mvm", "mcm", "answer", "label")
        weights = {name: getattr(self, name) for name in names}
        for name, weight in weights.items():
            check(weight >= 0, f"objectives.{name} must not be negative: {weight}")
        check(any(weights.values()), "objectives: every weight is 0, so there is nothing to train")
        check(0 < self.mlm_ratio <= 1, f"objectives.mlm_ratio={self.mlm_ratio} not in (0, 1]")
        check(
            self.mcm_template.count("{}") >= 2,
            f"objectives.mcm_template={self.mcm_template!r} must have at least two {{}}",
        )
        check(
            self.mlm > 0 or self.mask_text_for == "mlm",
            "objectives.mask_text_for=all hides words, but objectives.mlm is 0",
        )

    @property
    def reads_caption(self) -> bool:
        """Whether an objective reads the text, a caption or a question, with no word hidden."""
        return self.mask_text_for == "mlm" and any((self.vtc, self.vtm, self.answer, self.label))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and decay."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    final_ratio: float = 0.01
    """Learning rate at the last step, as a fraction of the peak."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.999
    """Decay of the mean of squared gradients."""
    weight_decay: float = 0.02
    """Decoupled weight decay of matrices; biases, norms and single tokens never decay."""
    clip_norm: float = 0.0
    """Clip the gradient to this global norm; 0 does not clip."""
    accumulate_steps: int = 1
    """Parts into which a batch is split, one after the other, to save memory.

    VTC compares the whole batch all the same, at the price of one more forward pass of the
    encoders. What VTM and MCM draw from the batch comes from one part; other losses are the means
    over the parts."""

    def __post_init__(self):
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} must be in [0, 1), not {value}")
        check(self.weight_decay >= 0, f"optim.weight_decay is negative: {self.weight_decay}")
        check(self.learning_rate > 0, f"optim.learning_rate must be positive: {self.learning_rate}")
        check(self.warmup_steps >= 0, f"optim.warmup_steps is negative: {self.warmup_steps}")
        check(0 <= self.final_ratio <= 1, f"optim.final_ratio={self.final_ratio} not in [0, 1]")
        check(self.accumulate_steps >= 1, "optim.accumulate_steps must be at least 1")
        check(self.clip_norm >= 0, f"optim.clip_norm must not be negative: {self.clip_norm}")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes the rest."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Parts into which parameters and optimizer state are cut; also splits the batch."""
    tensor: int = 1
    """Parts into which attention heads and feed-forward networks are cut."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        check(
            all(size == -1 or size >= 1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one -1: data={self.data} fsdp={self.fsdp} "
            f"tensor={self.tensor}",
        )


@dataclass(frozen=True)
class InitConfig:
    """Published weights to start from: folders, or names of models on the hub."""

    text: str = ""
    """A BERT for the text encoder; its upper layers go to the fusion, if that is made of layers."""
    video: str = ""
    """A ViT, DeiT, ViT-MAE, DINOv2, CLIP, BEiT or VideoMAE for the video encoder."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, and what happens how often."""

    steps: int = 10_000
    """Last training step."""
    log_every_steps: int = 50
    """Steps between two lines of metrics."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    wandb_project: str = ""
    """Send metrics to this project of Weights & Biases too."""
    max_idle_secs: float = 1800.0
    """A process that makes no progress for so long ends with an error that says what each process
    waits for; compiling a step must be shorter. 0 waits forever."""
    init_from: str = ""
    """Work directory or export whose parameters are the initial ones."""
    init: InitConfig = InitConfig()
    """In its place, published weights for single parts."""

    def __post_init__(self):
        for name in ("steps", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            value = getattr(self, name)
            check(value >= 1, f"train.{name} must be at least 1, not {value}")
        check(self.eval_every_steps >= 0, "train.eval_every_steps must not be negative")
        check(self.max_idle_secs >= 0, "train.max_idle_secs must not be negative")
        check(
            not (self.init_from and (self.init.text or self.init.video)),
            "train.init_from gives all parameters: not with train.init",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is asked about the evaluation split, and how it is reported."""

    rerank_top_k: int = 0
    """Candidates of each query that the matching head scores again; 0 ranks by VTC alone."""
    choices: int = 0
    """Options of multiple-choice questions: those of the split, or else each caption among others;
    0 asks none."""
    frame_ensemble: Literal["concat", "mean", "max", "lse"] = "concat"
    """How the matching head reads the frames of a clip: all together, or one by one, with the mean,
    the maximum or the log-sum-exp of their scores."""
    answers_top_k: int = 128
    """Answers that the decoder scores whole: those whose first word is the likeliest."""
    dual_softmax: bool = False
    """Report retrieval with dual softmax too, apart, because it uses the whole test set."""
    resamples: int = 1000
    """Bootstrap resamples behind the confidence intervals."""
    pictures: int = 8
    """Queries or questions on each page of pictures; 0 draws none."""

    def __post_init__(self):
        check(self.rerank_top_k >= 0, "evaluation.rerank_top_k must not be negative")
        check(self.choices == 0 or self.choices >= 2, "evaluation.choices must be 0 or at least 2")
        check(self.answers_top_k >= 1, "evaluation.answers_top_k must be at least 1")
        check(self.resamples >= 1, "evaluation.resamples must be at least 1")
        check(self.pictures >= 0, "evaluation.pictures must not be negative")


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides what a run computes."""

    name: str = "experiment"
    """Name of the run; the default work directory is runs/NAME."""
    seed: int = 0
    """The one source of randomness: initialization, data order, masks, dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        check_values(self)
        check(self.seed >= 0, f"seed must not be negative: {self.seed}")
        size, patch = self.data.image_size, self.model.video.patch_size
        check(
            size % patch == 0,
            f"data.image_size={size} is not a multiple of model.video.patch_size={patch}",
        )
        check(
            self.data.text_len <= self.model.text.max_len,
            f"data.text_len={self.data.text_len} exceeds "
            f"model.text.max_len={self.model.text.max_len}",
        )
        self._check_objectives()
        check(
            self.data.batch_size % self.optim.accumulate_steps == 0,
            f"data.batch_size={self.data.batch_size} is not divisible by "
            f"optim.accumulate_steps={self.optim.accumulate_steps}",
        )
        check(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} leaves nothing of "
            f"train.steps={self.train.steps}",
        )

    def _check_objectives(self) -> None:
        """What is trained and asked needs its data and its parts of the model."""
        check(
            not self.objectives.mcm or self.objectives.mcm_len <= self.model.text.max_len,
            f"objectives.mcm_len={self.objectives.mcm_len} exceeds "
            f"model.text.max_len={self.model.text.max_len}",
        )
        others = self.objectives.mcm_template.count("{}") - 1
        check(
            not self.objectives.mcm or self.data.num_others in (0, others),
            f"data.num_others={self.data.num_others}, but objectives.mcm_template needs {others} "
            "(or 0: from the batch)",
        )
        for name, task in (("answer", "questions"), ("label", "labels")):
            check(
                not getattr(self.objectives, name) or self.data.task == task,
                f"objectives.{name} needs data.task={task}, not {self.data.task}",
            )
        decodes = self.objectives.answer > 0 and self.objectives.answer_kind == "decoder"
        check(
            decodes == (self.data.answer_len > 0),
            f"data.answer_len={self.data.answer_len}: it must be positive if, and only if, "
            "objectives.answer_kind=decoder is trained",
        )
        mask = self.model.video.mask
        check(
            not self.objectives.mvm or (mask.scheme != "none" and mask.ratio > 0),
            "objectives.mvm reconstructs removed patches, but model.video.mask removes none",
        )
        check(
            not self.evaluation.rerank_top_k or self.objectives.vtm > 0,
            "evaluation.rerank_top_k needs the matching head: set objectives.vtm above 0",
        )
        asked = self.evaluation.choices
        check(
            not asked or bool(self.objectives.vtm or self.objectives.mcm),
            "evaluation.choices needs a head: set objectives.vtm or objectives.mcm above 0",
        )
        check(
            not (asked and self.objectives.mcm) or asked == others + 1,
            f"evaluation.choices={asked}, but objectives.mcm_template has {others + 1} options",
        )


def save_config(config: ExperimentConfig, path: Path) -> None:
    """Writes the config as JSON."""
    write_whole(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path: Path) -> ExperimentConfig:
    """Reads a config written by `save_config`.

    Raises:
      ValueError: a field is unknown or its value is out of range; names file and field.
    """
    try:
        return config_of(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_of(tree: Any) -> ExperimentConfig:
    """The config that JSON of this or of an earlier version says.

    Raises:
      ValueError: a field is unknown or its value is out of range; names it.
    """
    match tree:
        case {"model": {"remat": bool(remat)}}:  # as it was before there were policies
            tree = tree | {"model": tree["model"] | {"remat": "full" if remat else "none"}}
    return from_dict(ExperimentConfig, tree)
