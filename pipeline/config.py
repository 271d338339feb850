"""RunConfig: what is learned (the DeepSpeed JSON says how it is computed).

Frozen pydantic models, one a section; unknown keys are refused. A preset (TOML) fills them, then
`section.key=value` words from the command line. Construction is pure: it touches no disk, no
network and no device. Rules that join keys are validators here; each names the dotted paths it
is about, so that `pipeline.config_loading` can say where the values came from.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from pipeline.config_networks import (
    ModelSection,
    NetworkSection,
    NonNegativeFloat,
    NonNegativeInt,
    ObjectiveSection,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)
from pipeline.config_schedule import ExtensionSection, PhaseSection, ScheduleSection

__all__ = [
    "CheckpointSection",
    "DataSection",
    "ExtensionSection",
    "ModelSection",
    "NetworkSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PhaseSection",
    "RunConfig",
    "ScheduleSection",
    "Section",
]


class RunSection(Section):
    """[run]: where a run lives and what makes it repeatable."""

    folder: str = "runs/default"
    """Run folder: checkpoints, metrics, logs; the same folder resumes the run."""
    seed: NonNegativeInt = 42
    """Key of every random function: initial weights, sample order, masks, draws, dropout."""
    deterministic: bool = True
    """Deterministic kernels only; an operation without one is an error, not a surprise."""


SourceWeights = Annotated[
    tuple[tuple[str, NonNegativeFloat], ...],
    # A table to people and in files; a tuple to us, because configurations are hashed.
    BeforeValidator(lambda value: tuple(value.items()) if isinstance(value, dict) else value),
    PlainSerializer(dict),
]


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
    source_weights: SourceWeights = ()
    """Source of the dataset -> how often it is read while a source of weight 1 is read once, 0
    leaves it out; where not given, what the dataset's recipe says, or 1."""
    sampling_exponent: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Sources are drawn in proportion to weight x tokens ^ exponent: 1 by size, 0 all alike, 0.3 as
    for the languages of XLM-R."""


class OptimizerSection(Section):
    """[optimizer]: AdamW for both networks, each with its own learning rate and clipping norm."""

    generator_learning_rate: PositiveFloat
    """Peak learning rate of the generator."""
    discriminator_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the discriminator; the generator's where not given."""
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    """Adam's averages (0.98 in the paper, 0.999 in the released code)."""
    eps: PositiveFloat = 1e-6
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of everything but biases and LayerNorm weights; Delta decays too."""
    bias_correction: bool = True
    """Adam divides its averages by 1 - beta^t; the released code does not."""

    def learning_rate(self, network: str) -> float:
        """Look up a network's peak learning rate.

        Args:
            network: "generator" or "discriminator"; of "joint", whose parameter groups have the
                rates of their networks, the generator's.

        Returns:
            The rate.
        """
        if network == "discriminator" and self.discriminator_learning_rate is not None:
            return self.discriminator_learning_rate
        return self.generator_learning_rate


class InitializeSection(Section):
    """[initialize]: continued pre-training from a model that exists."""

    path: str = ""
    """Run folder, commit, export, or repository in the released or transformers' layout."""
    generator_path: str = ""
    """Repository of the generator, where it is not beside the discriminator's."""
    missing_heads: Literal["refuse", "fresh"] = "refuse"
    """`fresh` also takes an encoder whose head was not saved, and begins with an untrained one."""
    new_vocabulary: Literal["refuse", "resize"] = "refuse"
    """`resize` starts another tokenizer's table: pieces that both know keep their rows."""
    guard_margin: NonNegativeFloat = 0.05
    """Relative rise of a held-out loss over the starting point that gives a warning."""


class CheckpointSection(Section):
    """[checkpoint]: commits and how many are kept."""

    interval_steps: PositiveInt = 1000
    """Optimizer steps between commits."""
    keep_last: PositiveInt = 3
    """Newest commits that are kept."""
    milestone_interval_steps: NonNegativeInt = 0
    """Every commit whose step is a multiple of this is kept for ever; 0 keeps none."""
    interval_seconds: NonNegativeFloat = 0.0
    """Seconds since the newest commit after which the next step boundary has one; 0 never."""
    asynchronous: bool = False
    """Training goes on while a snapshot in memory is written, synced and hashed."""
    write_attempts: PositiveInt = 3
    """Times that a commit is tried, with a growing pause, before the run goes on without it."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Milestones at steps that have no commit."""
        if self.milestone_interval_steps % self.interval_steps:
            yield (
                "milestone_interval_steps",
                f"{self.milestone_interval_steps} is not a multiple of checkpoint.interval_steps"
                f" {self.interval_steps}: most milestones would have no commit",
            )


class SafetySection(Section):
    """[safety]: what notices hangs, slow ranks, divergence and silent corruption."""

    hang_seconds: PositiveFloat = 60.0
    """A rank without progress for this long, and for longer than `hang_step_factor` steps, ends the
    run with exit code 86."""
    hang_step_factor: PositiveFloat = 5.0
    """Times the slowest recent step that a rank may be without progress."""
    startup_seconds: PositiveFloat = 600.0
    """The same limit until the first step has ended: imports, compilation, the first reads."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """How long torch lets a rank wait in one collective. Where the limits above work they end a
    hang long before; this one ends what they cannot see, with a traceback."""
    straggler_factor: Annotated[float, Field(gt=1.0)] = 1.5
    """A rank that computes this many times longer than the median rank is reported."""
    straggler_steps: PositiveInt = 50
    """Steps over which ranks are compared."""
    spike_threshold: NonNegativeFloat = 8.0
    """Robust z-score of a step's loss, against those of `spike_window_steps`, that is a spike; 0
    never is."""
    spike_window_steps: Annotated[int, Field(ge=16)] = 128
    """Steps that a loss is compared with."""
    spike_policy: Literal["log", "rollback"] = "log"
    """`rollback` goes back to the newest commit and leaves out the data since then."""
    max_rollbacks: NonNegativeInt = 2
    """Roll-backs to about the same place before the run ends with exit code 87."""
    resource_interval_seconds: NonNegativeFloat = 10.0
    """Time between looks at what the run can run out of; what follows says when it stops for that,
    after a commit. None of it is more than half of what was there after the first step."""
    min_host_memory_gib: NonNegativeFloat = 1.0
    """Memory that must stay available on every host, or within the limit of the job, beside the
    copies that a commit makes; 0 does not watch."""
    min_gpu_memory_gib: NonNegativeFloat = 0.25
    """Memory that must stay free on every GPU at its highest point; 0 does not watch."""
    min_free_disk_gib: NonNegativeFloat = 1.0
    """Room that must stay free for the run folder beside the next commit; 0 does not watch."""
    min_free_inodes: NonNegativeInt = 1000
    """Files that must still fit there beside those of the next commit; 0 does not watch."""
    replica_interval_steps: NonNegativeInt = 500
    """Steps between comparisons of what all ranks should hold alike, beside those before commits; 0
    never compares."""


class EvaluationSection(Section):
    """[evaluation]: held-out figures during training."""

    interval_steps: NonNegativeInt = 5000
    """Optimizer steps between evaluations; 0 evaluates only at the end."""
    max_sequences: PositiveInt = 2048
    """Held-out sequences of one evaluation."""
    minimal_pairs: str = ""
    """File of sentence pairs (`sentence_good`, `sentence_bad`) that both networks are probed with
    at every evaluation, without training; empty for none."""
    minimal_pairs_compute_fraction: Probability = 0.0025
    """What the probe may cost of the training between two evaluations, in operations; it takes so
    many pairs. Short passes take more time than their operations: half of the half percent of the
    time that the probe should stay below."""


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
    curve: str = ""
    """File with the losses of runs that were made (`deberta report --write-reference`), to say by
    which steps this one is healthy; empty looks for one that comes with the program."""


class RunConfig(Section):
    """A whole run, as in `config.resolved.json`."""

    recipe: Literal["paper", "released_code"] = "paper"
    """Whose values a preset takes where the paper and the released code differ."""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    generator: NetworkSection
    """The masked language model; the only network of objective.task=mlm."""
    discriminator: NetworkSection | None = None
    """The network that tells replaced tokens from original ones; none with objective.task=mlm."""
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    initialize: InitializeSection = InitializeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    safety: SafetySection = SafetySection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    reference: ReferenceSection = ReferenceSection()

    @property
    def networks(self) -> dict[str, NetworkSection]:
        """The networks that are trained, by name."""
        if self.discriminator is None:
            return {"generator": self.generator}
        return {"generator": self.generator, "discriminator": self.discriminator}

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """All lengths that the run trains with, each once, the final one last."""
        final = self.data.sequence_length
        lengths = [phase.sequence_length or final for phase in self.schedule.phases]
        return (*dict.fromkeys(length for length in lengths if length != final), final)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """What the sections must agree on."""
        yield from self._contradicting_networks()
        if self.objective.enhanced_mask_decoder:
            yield from self._contradicting_decoder()
        for length in self.sequence_lengths:
            yield from self._contradicting_length(length)
        if self.initialize.generator_path and not self.initialize.path:
            yield "initialize.generator_path", "is given without initialize.path; give both"

    def _contradicting_networks(self) -> Iterator[tuple[str, str]]:
        """Networks that the task does not have, lacks, or cannot join."""
        task, generator, discriminator = self.objective.task, self.generator, self.discriminator
        if (task == "rtd") != (discriminator is not None):
            words = "is missing: objective.task=rtd trains two networks"
            if task == "mlm":
                words = "means nothing with objective.task=mlm, which trains [generator] alone"
            yield "discriminator", f"{words}; " + ("add" if task == "rtd" else "remove") + " it"
        if task == "mlm" and self.optimizer.discriminator_learning_rate is not None:
            yield (
                "optimizer.discriminator_learning_rate",
                "means nothing with objective.task=mlm, which trains [generator] alone; remove it",
            )
        if discriminator is None or self.objective.embedding_sharing == "nes":
            return
        if generator.word_embedding_size != discriminator.word_embedding_size:
            yield (
                "generator.embedding_size",
                f"{generator.word_embedding_size} differs from the discriminator's"
                f" {discriminator.word_embedding_size}; the networks share the word embeddings:"
                " set embedding_size in both (hidden_size where not given)",
            )
        has_positions = generator.position_biased_input or self.objective.enhanced_mask_decoder
        if discriminator.position_biased_input and not has_positions:
            yield (
                "discriminator.position_biased_input",
                "is true, but the generator has no absolute positions to share: set"
                " generator.position_biased_input=true",
            )
        lengths = {network.max_position_embeddings for network in (generator, discriminator)}
        if discriminator.position_biased_input and len(lengths) > 1:
            yield (
                "discriminator.max_position_embeddings",
                f"{discriminator.max_position_embeddings} differs from the generator's"
                f" {generator.max_position_embeddings}; the networks share the positions",
            )

    def _contradicting_decoder(self) -> Iterator[tuple[str, str]]:
        """Generators on which the enhanced mask decoder cannot stand."""
        generator = self.generator
        off = "or set objective.enhanced_mask_decoder=false"
        if generator.num_hidden_layers < 2:
            yield (
                "generator.num_hidden_layers",
                "1 is too few: the enhanced mask decoder reads the last layer but one;"
                f" write 2, {off}",
            )
        if generator.word_embedding_size != generator.hidden_size:
            yield (
                "generator.embedding_size",
                f"{generator.embedding_size} differs from hidden_size {generator.hidden_size}: the"
                f" enhanced mask decoder adds position rows to hidden states; make them equal,"
                f" {off}",
            )
        if generator.position_biased_input:
            yield (
                "generator.position_biased_input",
                "is true: the enhanced mask decoder brings in positions that the input already"
                f" has; set it to false, {off}",
            )

    def _contradicting_length(self, length: int) -> Iterator[tuple[str, str]]:
        """Sequence lengths that the networks or the masks do not reach."""
        for name, network in self.networks.items():
            if length > network.max_position_embeddings:
                yield (
                    "data.sequence_length",
                    f"{length} is more than {name}.max_position_embeddings"
                    f" {network.max_position_embeddings}; raise that in every network",
                )
        if round(self.objective.mask_prob * length) < 1:
            yield (
                "objective.mask_prob",
                f"{self.objective.mask_prob} of data.sequence_length {length} masks no token",
            )
