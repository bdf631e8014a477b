"""An experiment as data: frozen dataclasses, checked when made, saved as JSON.

Field docstrings become the `--help` text. A ratio is always the fraction removed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.schema.checks import MissingError, UserError, check, check_folder_name
from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.fields import (
    Checked,
    Count,
    NonNegative,
    Positive,
    Rate,
    Ratio,
    Share,
    Size,
    flag,
)
from data_pipelines.schema.json_files import from_dict, read_json
from vlmae.config.model import ModelConfig
from vlmae.config.objectives import OBJECTIVES, objectives_with
from vlmae.ops.grid import grid_cell


@dataclass(frozen=True)
class ObjectivesConfig(Checked):
    """Weights of the training objectives; 0 switches one off."""

    # Equal weights, as in the systems that both papers build on (Singularity, ALPRO). MCM, answers
    # and labels need data of their own kind, so they are off.
    vtc: NonNegative = 1.0
    """Video-text contrastive learning."""
    vtm: NonNegative = 1.0
    """Video-text matching with hard negatives."""
    mlm: NonNegative = 1.0
    """Masked language modeling on the fused text."""
    mvm: NonNegative = 1.0
    """Masked visual modeling: reconstruction of the removed patches."""
    mcm: NonNegative = 0.0
    """Multiple choice modeling: the true caption among negatives (MuLTI)."""
    answer: NonNegative = 0.0
    """Question answering; the text of a row is the question."""
    answer_kind: Literal["classifier", "decoder"] = "classifier"
    """classifier: one class for each answer (MuLTI); decoder: the answer token by token, and all
    classes ranked by the probability of their answers (SMAUG)."""
    label: NonNegative = 0.0
    """Multi-label classification: a binary decision for each class (MuLTI)."""
    # Singularity's, which SMAUG builds on; BERT and ALPRO mask 0.15.
    mlm_ratio: Rate = 0.5
    """Fraction of the tokens that masked language modeling predicts."""
    mask_text_for: Literal["mlm", "all"] = "mlm"
    """all: VTC and VTM read the masked text too, which saves a pass of the text encoder."""
    vtc_loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: each clip among all texts, and each text among all clips (CLIP); sigmoid: each pair
    by itself, with a learned bias (SigLIP)."""
    vtc_scope: Literal["global", "local"] = "global"
    """Source of VTC's negatives: the global batch, or each group's own rows."""
    # Local by default, unlike VTC: a negative of VTM brings all its tokens, where one of VTC brings
    # a vector.
    vtm_scope: Literal["global", "local"] = "local"
    """Source of VTM's negatives; with local, no video tokens cross the network, as long as no group
    is shared by devices. The loss depends on the number of groups."""
    vtm_hardness: Share = 1.0
    """How hard VTM's negatives are: they are drawn by the softmax of VTC's logits times this; 1 as
    in ALBEF, 0 uniformly. From scratch VTM learns nothing from hard ones for long: a first phase of
    `train.phases` may set 0."""
    local_groups: Count = 0
    """Groups into which a batch is cut for the scope local; 0: one for each device that shares it
    when the run begins. A run that goes on with another number of devices keeps its groups."""
    mcm_kind: Literal["concat", "score"] = "concat"
    """concat: all options in one text, and the answer is the index of the truth; score: each option
    is scored alone."""
    # The paper names four options; the wording is ours.
    mcm_template: str = "what does the video describe? [SEP] (a) {} (b) {} (c) {} (d) {}"
    """Question with a {} for each option; the number of options holds for both kinds."""
    # Stored as ids, so that a run and its export compose questions without the tokenizer.
    mcm_template_ids: tuple[int, ...] = ()
    """Token ids of the template, -1 for an option; filled from the tokenizer at the start."""
    mcm_len: Size = 128
    """Maximal tokens of a question with its options; options are cut to fit."""

    def check_together(self) -> None:
        """Check that something is trained, and that options fit it."""
        check(
            bool(self.weights),
            f"nothing to train: of {', '.join(map(flag, OBJECTIVES))}, one must be above 0",
        )
        check(self.mcm_template.count("{}") >= 2, "--mcm-template must have at least two {}")
        check(
            self.need("masked_text") or self.mask_text_for == "mlm",
            "--mask-text-for=all hides words, but --mlm is 0",
        )

    @property
    def weights(self) -> dict[str, float]:
        """Non-zero weights by objective, in the order of the registry."""
        weights = {name: getattr(self, name) for name in OBJECTIVES}
        return {name: weight for name, weight in weights.items() if weight}

    def need(self, field: str) -> bool:
        """Return True if an objective of non-zero weight has this field of `Objective` set.

        Raises:
          AttributeError: `Objective` has no such field.
        """
        # A list and no generator: a field that does not exist fails even where no objective is left
        # to ask.
        return any([getattr(OBJECTIVES[name], field) for name in self.weights])

    @property
    def reads_caption(self) -> bool:
        """True if an objective reads the text, a caption or a question, with no token masked."""
        return self.mask_text_for == "mlm" and self.need("caption")

    @property
    def min_rows(self) -> int:
        """Fewest rows of a group, on one device: two where negatives come from its own rows."""
        return 2 if self.need("hard_pairs") and self.vtm_scope == "local" else 1


@dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW with warm-up and decay."""

    # AdamW as in Singularity; MuLTI's experiments set ALPRO's betas and decay.
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Learning rate after the warm-up. cosine, linear: decays at once; wsd: stays at its peak and
    decays linearly in the last `decay_share` of the steps (warm-up, stable, decay)."""
    decay_share: Share = 0.2
    """Share of the steps in which wsd decays; 0 never does, for a trunk that other runs branch off
    with `train.init_step`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    warmup_share: Ratio = 0.0
    """The same as a share of all steps, in place of `warmup_steps`; 0: these count."""
    # Singularity's cosine ends at 1 % of the peak.
    final_ratio: Share = 0.01
    """Learning rate at the last step, as a fraction of the peak."""
    b1: Ratio = 0.9
    """Decay of the mean of gradients."""
    b2: Ratio = 0.999
    """Decay of the mean of squared gradients."""
    weight_decay: NonNegative = 0.02
    """Decoupled weight decay of matrices; biases, norms and single tokens never decay."""
    layer_decay: Rate = 1.0
    """Decay of the learning rate from each encoder block to the one below it, for finetuning: an
    encoder of d blocks learns with rate * decay^(d - i) in block i, and with decay^(d + 1) in its
    embeddings; all above the blocks has the full rate (BEiT, MAE). 1: none."""
    clip_norm: NonNegative = 0.0
    """Clip the gradient to this global norm; 0 does not clip."""
    ema_decay: Ratio = 0.0
    """Keep exponential moving averages of the parameters with this decay, for which 0.999 is
    common, and evaluate and export them in place of the parameters. They take the memory of the
    parameters once more; 0: none."""
    accumulate_steps: Size = 1
    """Micro-batches of a step, computed one after the other to save memory.

    VTC compares the whole batch all the same, for one more forward pass of the encoders. VTM and
    MCM draw their negatives from one micro-batch; other losses are means over the micro-batches."""


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; one axis may be -1 and takes the rest."""

    # The rest of the devices goes to replicas, which exchange the least.
    data: int = -1
    """Replicas of the model, each with its part of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; also splits the batch."""
    tensor: int = 1
    """Shards of attention heads and feed-forward networks."""

    def check_together(self) -> None:
        """Check that sizes are positive, but for one that may be -1."""
        sizes = (self.data, self.fsdp, self.tensor)
        check(
            all(size == -1 or size >= 1 for size in sizes) and sizes.count(-1) <= 1,
            "sizes must be positive, at most one -1: "
            f"--data={self.data} --fsdp={self.fsdp} --tensor={self.tensor}",
        )


@dataclass(frozen=True)
class InitConfig(Checked):
    """Published weights to start from: folders, or names of models on the hub."""

    text: str = ""
    """BERT or CLIP weights for the text encoder; upper layers of a BERT go to the fusion, if it has
    layers."""
    video: str = ""
    """ViT, DeiT, ViT-MAE, DINOv2, CLIP, SigLIP, BEiT or VideoMAE weights for the video encoder. The
    same CLIP in both brings its projections and temperature too."""


@dataclass(frozen=True)
class PhaseConfig(Checked):
    """Part of the steps with its own cost; a field that is not set is that of the experiment."""

    share: Rate = 1.0
    """Share of the steps."""
    mask_ratio: Ratio | None = None
    """Masking ratio of patches; at 0 nothing is removed, and MVM is left out."""
    keep_rate: Rate | None = None
    """Fraction of the tokens that each pruning stage keeps."""
    train_size: Size | None = None
    """Height and width of the frames in pixels."""
    num_frames: Size | None = None
    """Frames of a clip at most; a source of fewer keeps its own number."""
    vtm: NonNegative | None = None
    """Weight of VTM."""
    vtm_hardness: Share | None = None
    """How hard VTM's negatives are."""


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Length of the training loop, and how often it logs, evaluates and saves."""

    steps: Size = 10_000
    """Last training step."""
    epochs: NonNegative = 0.0
    """Passes over the data, in place of `steps`, which follow from it, the batch size and the
    prepared data when the run begins; 0: `steps` count. A pass has as many rows as the training
    sources have captions, questions or labeled clips, whatever the task reads."""
    # A line of metrics costs a synchronization with the devices, see `TrainLog.add`.
    log_every_steps: Size = 50
    """Steps between two lines of metrics."""
    eval_every_steps: Count = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_every_epochs: NonNegative = 0.0
    """Epochs between evaluations, in place of `eval_every_steps`; 0: these count."""
    save_every_steps: Size = 1000
    """Steps between checkpoints; the last step is always saved."""
    save_every_epochs: NonNegative = 0.0
    """Epochs between checkpoints, in place of `save_every_steps`; 0: these count."""
    save_every_minutes: NonNegative = 0.0
    """Minutes between checkpoints, beside `save_every_steps`; 0 saves by steps alone. Several
    processes look at the clock when they log."""
    keep_checkpoints: Size = 2
    """Newest checkpoints that are kept."""
    best_metric: str = ""
    """Metric of the evaluations, such as retrieval/t2v_r1, whose best checkpoint is kept beside the
    newest. The result is then that checkpoint's. Empty: none."""
    patience: Count = 0
    """Evaluations in a row without a better `best_metric` after which training ends; 0 never ends
    early."""
    wandb_project: str = ""
    """Send metrics to this project of Weights & Biases too."""
    max_idle_secs: NonNegative = 1800.0
    """Seconds without progress after which a process ends with an error that says what each process
    waits for; compiling a step must be shorter. 0 waits forever."""
    max_skipped_steps: Count = 0
    """Steps in a row that leave parameters and moments as they were, because a loss, the gradient
    or the result is not finite; their share is `optim/skipped_ratio`. 0 skips none."""
    max_rollbacks: Count = 0
    """Times that a run goes back to its last checkpoint after a step that is not finite and not
    skipped, and on with the next batch; counted from each start. Then, or with 0, it stops."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases of training, one after the other, each compiled once; empty: all steps are alike."""
    init_from: str = ""
    """Work directory or export to take the initial parameters from."""
    init_step: Count = 0
    """Branch off the run `init_from` at the checkpoint of this step: parameters, Adam's moments and
    the number of the step go on, and so do the batches. 0 takes the newest parameters alone and
    starts at step 0."""
    init: InitConfig = InitConfig()
    """Published weights for single encoders, instead of `init_from`."""
    init_differs: tuple[str, ...] = ()
    """Fields that are meant to differ from those of the source, though no shape shows them, such as
    model.video.layout.eps; others are taken over (the layout) or refused."""

    def check_together(self) -> None:
        """Check that initial parameters come from one place, and that phases fill the steps."""
        check(
            not (self.init_from and (self.init.text or self.init.video)),
            "--init-from gives all parameters: not with --init.text or --init.video",
        )
        check(
            not self.init_step or bool(self.init_from),
            f"--init-step={self.init_step} needs --init-from",
        )
        check(
            self.init_step < self.steps or self.epochs > 0,  # steps are not known yet
            f"--init-step={self.init_step} leaves nothing of --steps={self.steps}",
        )
        check(
            not self.patience or bool(self.best_metric),
            f"--patience={self.patience} needs --best-metric",
        )
        check(
            not self.best_metric or self.eval_every_steps > 0 or self.eval_every_epochs > 0,
            f"--best-metric={self.best_metric} needs --eval-every-steps or --eval-every-epochs",
        )
        shares = [phase.share for phase in self.phases]
        check(
            not shares or abs(sum(shares) - 1) < 1e-6,
            f"--phases: the shares {shares} add up to {sum(shares):.6g}, not 1",
        )


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """Questions about the evaluation split, and how results are reported."""

    rerank_top_k: Count = 0
    """Best candidates of each query that the matching head re-ranks; 0 ranks by VTC alone."""
    rerank_by: Literal["sum", "match"] = "sum"
    """sum: VTC's similarity over its temperature plus VTM's score (BLIP); match: VTM's score alone
    (Singularity)."""
    choices: Count = 0
    """Options of multiple-choice questions: those of the split, or else each caption among
    negatives; 0 asks none."""
    frame_ensemble: Literal["concat", "mean", "max", "lse"] = "concat"
    """Frames that the matching head reads at a time: concat reads all together; mean, max and lse
    score one by one and take the mean, maximum or log-sum-exp of the scores."""
    # Singularity's; each answer that is scored whole costs a pass of the decoder.
    answers_top_k: Size = 128
    """Answers that the decoder scores whole: those with the likeliest first token."""
    prompts: tuple[str, ...] = ()
    """Classify the clips of the split by prompts, zero-shot, in place of all other evaluations:
    templates with a {} for the class, or files with one in each line. The prompts of a class are
    averaged."""
    labels: str = ""
    """File of the classes that `prompts` tell apart, a label in each line, or a label, a tab and
    its name in prompts; empty: the labels of the split."""
    dual_softmax: bool = False
    """Report retrieval with dual softmax too, separately, because it uses the whole test set."""
    also_pruned: bool = False
    """Evaluate again at the keep rate of training, as `pruned_retrieval/...`, where it is another
    than that of evaluation."""
    pictures: Count = 8
    """Queries or questions on each page of pictures; 0 draws none."""

    def check_together(self) -> None:
        """Check that a question has several options, and that labels have prompts."""
        check(self.choices != 1, "--choices must be 0 or at least 2, not 1")
        check(
            not self.labels or bool(self.prompts),
            f"--labels={self.labels} needs --prompts, such as --prompts 'a video of {{}}'",
        )


@dataclass(frozen=True)
class ExperimentConfig(Checked):
    """Configuration of a run: everything that decides its results."""

    name: str = "experiment"
    """Name of the run; the default work directory is runs/NAME."""
    seed: Count = 0
    """Seed of all randomness: initialization, data order, masks, dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check_together(self) -> None:
        """Check that data, model, objectives and training fit each other."""
        # Flags are written in full here: this is the whole, and `check_config` has no path to put
        # before them.
        check_folder_name(self.name, "--name")  # else runs/NAME could be anywhere
        data, model = self.data, self.model
        patch = model.video.patch_size
        for name, size in {"image-size": data.image_size, "train-size": data.frame_size}.items():
            check(
                size % patch == 0,
                f"--data.{name}={size} is not a multiple of --model.video.patch-size={patch}",
            )
        # Here and not in `MaskConfig`, which does not know the number of patches.
        self._check_grid_mask(data.frame_size // patch)
        self._check_train_size()
        check(
            data.text_len <= model.text.max_len,
            f"--data.text-len={data.text_len} exceeds --model.text.max-len={model.text.max_len}",
        )
        parts = self.optim.accumulate_steps
        check(
            data.batch_size % parts == 0,
            f"--data.batch-size={data.batch_size} is not divisible by "
            f"--optim.accumulate-steps={parts}",
        )
        check(
            self.optim.warmup_steps < self.train.steps,
            f"--optim.warmup-steps={self.optim.warmup_steps} leaves nothing of "
            f"--train.steps={self.train.steps}",
        )
        self._check_objectives()
        self._check_evaluation()
        self._check_choices()

    def _check_train_size(self) -> None:
        video = self.model.video
        sizes = {self.data.frame_size, *(phase.train_size for phase in self.train.phases)}
        if sizes - {None, self.data.image_size}:
            check(
                video.positions != "sincos_clip" and video.layout.relative_bias == "none",
                "--data.train-size resizes positions within a frame: not with "
                "--model.video.positions=sincos_clip or --model.video.layout.relative-bias",
            )
        check(
            not (self.train.phases and video.sparsify.warmup_rates),
            "--model.video.sparsify.warmup-rates are phases of their own: not with --train.phases",
        )

    def _check_grid_mask(self, side: int) -> None:
        mask = self.model.video.mask
        cells = [cell for cell in range(2, side + 1) if side % cell == 0]
        possible = ", ".join(f"{1 - 1 / cell**2:.4g} ({cell} x {cell})" for cell in cells)
        check(
            mask.scheme != "grid" or grid_cell(mask.ratio) in cells,
            f"--model.video.mask.scheme=grid: the cells of --model.video.mask.ratio={mask.ratio} "
            f"do not divide {side} x {side} patches; use one of {possible}",
        )

    def _check_objectives(self) -> None:
        """Check that every objective has the data and the masks that it reads."""
        objectives, data, mask = self.objectives, self.data, self.model.video.mask
        removes = mask.scheme != "none" and mask.ratio > 0
        for name in objectives.weights:
            needs = OBJECTIVES[name]
            check(
                needs.task in ("", data.task),
                f"{flag(f'objectives.{name}')} needs --data.task={needs.task}, not {data.task}",
            )
            check(
                removes or not needs.removed_patches,
                f"{flag(f'objectives.{name}')} reconstructs removed patches, but "
                "--model.video.mask.ratio or --model.video.mask.scheme removes none",
            )
        check(
            not (objectives.need("masked_text") and self.model.text.layout.causal),
            f"--objectives.mlm={objectives.mlm} predicts words from both sides, but a text encoder "
            "with --model.text.layout.causal=True (CLIP's) reads one alone: set --objectives.mlm=0",
        )
        # Both ways: answers that nobody reads would be tokenized and sent with every batch.
        decodes = objectives.answer > 0 and objectives.answer_kind == "decoder"
        check(
            decodes == (data.answer_len > 0),
            f"--data.answer-len={data.answer_len}: it must be positive if, and only if, "
            "--objectives.answer-kind=decoder is trained",
        )

    def _check_evaluation(self) -> None:
        """Check that every question of the evaluation has a trained head."""
        # Derived from the registry, so that a new objective with this head needs no line here.
        trainers = {
            "rerank_top_k": objectives_with("heads", "match_head"),
            "choices": objectives_with("evaluators", "multiple_choice"),
            "prompts": objectives_with("evaluators", "zero_shot"),
        }
        for name, objectives in trainers.items():
            flags = " or ".join(flag(f"objectives.{objective}") for objective in objectives)
            check(
                not getattr(self.evaluation, name)
                or any(objective in self.objectives.weights for objective in objectives),
                f"{flag(f'evaluation.{name}')} needs a trained head: set {flags} above 0",
            )

    def _check_choices(self) -> None:
        """Check that multiple choice has the same number of options everywhere."""
        objectives, choices = self.objectives, self.evaluation.choices
        # A template of unused MCM may be of any length.
        if not objectives.mcm:
            return
        check(
            objectives.mcm_len <= self.model.text.max_len,
            f"--objectives.mcm-len={objectives.mcm_len} exceeds "
            f"--model.text.max-len={self.model.text.max_len}",
        )
        options = objectives.mcm_template.count("{}")
        check(
            self.data.num_others in (0, options - 1),
            f"--data.num-others={self.data.num_others}, but --objectives.mcm-template needs "
            f"{options - 1} (or 0: from the batch)",
        )
        check(
            choices in (0, options),
            f"--evaluation.choices={choices}, but --objectives.mcm-template has {options} options",
        )


def load_config(path: Path) -> ExperimentConfig:
    """Read a config written by `vlmae.runs.workdir.save_config`.

    Raises:
      MissingError: there is no such file.
      UserError: it is not JSON, a field is unknown, or its value is refused; names file and field.
    """
    # Read as a whole and then checked: a message names the file, and then the field as it is typed
    # on the command line.
    try:
        tree = read_json(path, object)
    except MissingError as error:
        raise MissingError(f"{error}; is {path.parent} a run?") from None
    try:
        return config_of(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def config_of(tree: Any) -> ExperimentConfig:
    """Build the config from JSON of this or of an earlier version.

    Raises:
      UserError: a field is unknown or its value is out of range; names it.
    """
    match tree:
        case {"model": {"remat": bool(remat)}}:  # older versions had a switch, not policies
            tree = tree | {"model": tree["model"] | {"remat": "full" if remat else "none"}}
    match tree:
        case {"evaluation": {"resamples": _, **others}}:  # of the bootstrap in older versions
            tree = tree | {"evaluation": others}
    return from_dict(ExperimentConfig, tree)
