"""RunConfig: what is learned (the DeepSpeed JSON says how it is computed).

Frozen pydantic models, one a section; unknown keys are refused. A preset (TOML) fills them, then
`section.key=value` words from the command line. Construction is pure: it touches no disk, no
network and no device. Rules that join keys are validators here; each names the dotted paths it
is about, so that `pipeline.config_loading` can say where the values came from.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: immutable, strict about names, documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Find values that are valid one by one but not together.

        Yields:
            The key, relative to this section, and what is wrong with it.
        """
        yield from ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        """Raise all contradictions of this section as one error."""
        if problems := list(self.contradictions()):
            text = "; ".join(f"{key} {words}" for key, words in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "all": problems})
        return self


class RunSection(Section):
    """[run]: where a run lives and what makes it repeatable."""

    folder: str = "runs/default"
    """Run folder: checkpoints, metrics, logs; the same folder resumes the run."""
    seed: NonNegativeInt = 42
    """Key of every random function: initial weights, sample order, masks, draws, dropout."""
    deterministic: bool = True
    """Deterministic kernels only; an operation without one is an error, not a surprise."""


class DataSection(Section):
    """[data]: which shards are read, and how sequences are cut from them."""

    path: str = ""
    """Dataset folder written by `deberta-prep build`."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a sequence, [CLS] and [SEP] included."""
    block_sequences: PositiveInt = 512
    """Sequences in one shuffled block (about 1 MiB at length 512); part of the sample order."""
    window_blocks: PositiveInt = 64
    """Blocks among which samples are permuted; part of the sample order."""


class NetworkSection(Section):
    """[generator] and [discriminator]: one encoder each, field names of DebertaV2Config."""

    hidden_size: PositiveInt
    """Width of every layer; equal in both networks, which share the word embeddings."""
    num_hidden_layers: PositiveInt
    """Encoder layers; the generator needs two for its enhanced mask decoder."""
    num_attention_heads: PositiveInt
    """Attention heads; must divide hidden_size."""
    intermediate_size: PositiveInt
    """Inner width of the feed-forward block."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout after the embeddings, after each dense output and on the relative table."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout on attention probabilities."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: PositiveFloat = 1e-7
    """Epsilon of every LayerNorm."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence, and the clamp of relative distances before bucketing."""
    position_buckets: Annotated[int, Field(ge=2)] = 256
    """Half the rows of the relative table: logarithmic buckets of signed distance."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Heads that do not divide the width, and buckets that leave no room for the logarithm."""
        if self.hidden_size % self.num_attention_heads:
            yield (
                "num_attention_heads",
                f"{self.num_attention_heads} does not divide hidden_size {self.hidden_size}",
            )
        exact = self.position_buckets // 2
        if self.max_position_embeddings - 1 <= exact:
            yield (
                "position_buckets",
                f"{self.position_buckets} gives every distance up to {exact} a bucket of its own,"
                f" but distances end at {self.max_position_embeddings - 1};"
                f" write at most {2 * (self.max_position_embeddings - 2)}",
            )

    @property
    def attention_head_size(self) -> int:
        """Width of one head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads


class ModelSection(Section):
    """[model]: what both networks have in common."""

    vocab_size: PositiveInt = 128_100
    """Rows of the word table: pieces + [MASK], padded to a multiple of 100."""
    attention_backend: Literal["eager", "torch"] = "torch"
    """`eager` is the definition; `torch` the same numbers with less memory traffic."""
    activation_checkpointing: Literal["none", "attention", "full"] = "none"
    """Recompute nothing, each layer's attention, or each whole layer in the backward pass."""


class ObjectiveSection(Section):
    """[objective]: replaced token detection (arXiv:2111.09543, section 3)."""

    mask_prob: Annotated[float, Field(gt=0.0, le=0.5)] = 0.15
    """Share of a sequence's tokens that the generator must predict."""
    masking_law: Literal["uniform", "windowed"] = "uniform"
    """`uniform` reaches every position; `windowed` is the released code's, bare tail included."""
    rtd_loss_weight: PositiveFloat = 50.0
    """Lambda: weight of the discriminator's loss (50 in the paper, 10 in the released code)."""
    sampling_temperature: PositiveFloat = 1.0
    """Temperature of the generator's draws."""
    embedding_sharing: Literal["gdes"] = "gdes"
    """Gradient-disentangled embedding sharing: E_D = stop_gradient(E_G) + Delta."""
    update: Literal["decoupled"] = "decoupled"
    """Generator step first, then the discriminator's step on the updated E_G."""


class OptimizerSection(Section):
    """[optimizer]: AdamW for both networks, each with its own learning rate and clipping norm."""

    generator_learning_rate: PositiveFloat
    """Peak learning rate of the generator."""
    discriminator_learning_rate: PositiveFloat
    """Peak learning rate of the discriminator."""
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    """Adam's averages (0.98 in the paper, 0.999 in the released code)."""
    eps: PositiveFloat = 1e-6
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of everything but biases and LayerNorm weights; Delta decays too."""


class ScheduleSection(Section):
    """[schedule]: optimizer steps and the learning rate over them."""

    max_steps: PositiveInt
    """Optimizer steps of the whole run."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up from zero."""
    decay: Literal["linear"] = "linear"
    """Linear from the peak at the end of the warm-up to zero at max_steps."""
    max_consecutive_skipped_steps: PositiveInt = 20
    """Non-finite steps in a row (of either network) after which the run stops with exit code 87."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A warm-up that outlasts the run."""
        if self.warmup_steps > self.max_steps:
            yield (
                "warmup_steps",
                f"{self.warmup_steps} is more than schedule.max_steps {self.max_steps};"
                f" add schedule.warmup_steps={self.max_steps // 10}",
            )


class CheckpointSection(Section):
    """[checkpoint]: commits and how many are kept."""

    interval_steps: PositiveInt = 1000
    """Optimizer steps between commits."""
    keep_last: PositiveInt = 3
    """Newest commits that are kept."""
    milestone_interval_steps: NonNegativeInt = 0
    """Every commit whose step is a multiple of this is kept for ever; 0 keeps none."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Milestones at steps that have no commit."""
        if self.milestone_interval_steps % self.interval_steps:
            yield (
                "milestone_interval_steps",
                f"{self.milestone_interval_steps} is not a multiple of checkpoint.interval_steps"
                f" {self.interval_steps}: most milestones would have no commit",
            )


class EvaluationSection(Section):
    """[evaluation]: held-out figures during training."""

    interval_steps: NonNegativeInt = 5000
    """Optimizer steps between evaluations; 0 evaluates only at the end."""
    max_sequences: PositiveInt = 2048
    """Held-out sequences of one evaluation."""


class LoggingSection(Section):
    """[logging]: how often numbers are written."""

    interval_steps: PositiveInt = 50
    """Optimizer steps between rows of metrics.jsonl and TensorBoard."""


class ReferenceSection(Section):
    """[reference]: what the preset's source used; training warns where the JSON differs."""

    train_batch_size: PositiveInt | None = None
    """Sequences in one optimizer step."""
    gradient_clipping: PositiveFloat | None = None
    """Global gradient norm at which each network is clipped."""


class RunConfig(Section):
    """A whole run, as in `config.resolved.json`."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    generator: NetworkSection
    discriminator: NetworkSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    reference: ReferenceSection = ReferenceSection()

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """What the sections must agree on."""
        length = self.data.sequence_length
        if self.generator.hidden_size != self.discriminator.hidden_size:
            yield (
                "generator.hidden_size",
                f"{self.generator.hidden_size} differs from discriminator.hidden_size"
                f" {self.discriminator.hidden_size}; the networks share the word embeddings",
            )
        if self.generator.num_hidden_layers < 2:
            yield (
                "generator.num_hidden_layers",
                "1 is too few: the enhanced mask decoder reads the last layer but one; write 2",
            )
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            if length > network.max_position_embeddings:
                yield (
                    "data.sequence_length",
                    f"{length} is more than {name}.max_position_embeddings"
                    f" {network.max_position_embeddings}; raise that in both networks",
                )
        if round(self.objective.mask_prob * length) < 1:
            yield (
                "objective.mask_prob",
                f"{self.objective.mask_prob} of data.sequence_length {length} masks no token",
            )
