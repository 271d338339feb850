"""The pipeline and the plain reference, trained side by side from equal weights on equal noise.

    SideBySide   real steps and DeepSpeed engines in this process, and `PlainTraining`
    training_gap the judge of whole steps: losses, Adam's averages and weights after a few of them

Masks and noise of the draws come from the pipeline's random functions; all else is the reference's
own. Where a draw of the reference differs, it is counted with the distance of its two candidates,
and the reference goes on with the pipeline's draw.
"""

from dataclasses import dataclass, field

import torch

from pipeline.config import ObjectiveSection, OptimizerSection, ScheduleSection
from pipeline.engine_state import local_slices
from pipeline.engine_stepping import set_learning_rates
from pipeline.metrics import ratios
from pipeline.rtd import gumbel_noise
from pipeline.schedule import learning_rate_factor
from tests.engines import rig, sequence_batch, sequence_batches, small_config, small_pair
from tests.reference.plain_training import PlainBatch, PlainTraining
from tests.reference.small_networks import MASK_ID, VOCABULARY, leaves

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Flip:
    """A draw that differs, and by how much the reference preferred its own."""

    step: int
    preference: float


@dataclass
class Findings:
    """What two runs did; every list has an entry a step."""

    losses: list = field(default_factory=list)
    """(name, the pipeline's, the reference's)."""
    flips: list = field(default_factory=list)

    def worst_loss(self):
        """Largest relative difference of a loss."""
        return max(abs(ours - theirs) / abs(theirs) for _, ours, theirs in self.losses)


class SideBySide:
    """One objective, trained twice."""

    def __init__(
        self, world, objective=None, *, optimizer=None, schedule=None, network=None, **deepspeed
    ):
        """Start both from the same random weights; the arguments are changes of sections."""
        objective = objective or ObjectiveSection()
        peaks = {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 2e-3}
        self.section = OptimizerSection(**{**peaks, **(optimizer or {})})
        config = small_config(objective, **NO_DROPOUT, **(network or {}))
        plan = ScheduleSection(**{"max_steps": 100, "warmup_steps": 0, **(schedule or {})})
        config = config.model_copy(update={"optimizer": self.section, "schedule": plan})
        pair = small_pair(config=config)
        self.config, self.pair = config, pair
        weights = {name: leaves(getattr(pair, name)) for name in config.networks}
        self.plain = PlainTraining(config, weights, deepspeed.get("clipping", 1.0))
        settings = self.section.model_dump(exclude={"generator_learning_rate"})
        self.rig = rig(world, objective=objective, pair=pair, optimizer=settings, **deepspeed)
        self.findings, self.drawn = Findings(), []
        pair.generator.register_forward_hook(
            lambda module, arguments, output: self.drawn.append(output.drawn_BK)
        )

    def prepare(self, factor):
        """What sets an engine's rates before its step."""

        def prepare(name):
            set_learning_rates(self.rig.engines.by_name[name], self.section, factor)

        return prepare

    def batch(self, step):
        """A step's sequences as the reference takes them: whole, with masks and noise."""
        size = self.rig.plan.train_batch_size
        data = sequence_batch(range(step * size, (step + 1) * size))
        slots, draw = self.rig.keys.mask(data), self.rig.keys.draw(data)
        noise = None
        if draw is not None:
            words = draw.sample_words_B2
            noise = gumbel_noise(words, slots.positions_BK, 0, VOCABULARY, draw.key)
        length = data.input_ids_BL.shape[1]
        mask = torch.arange(length) < data.lengths_B[:, None]
        return PlainBatch(data.input_ids_BL, mask, *slots, noise, MASK_ID)

    def step(self, number):
        """Train both on one step."""
        self.drawn.clear()
        batches = sequence_batches(number, self.rig.plan)
        factor = learning_rate_factor(number, self.config.schedule)
        result = self.rig.step(number, batches, self.rig.keys, self.prepare(factor))
        figures = ratios(result.sums, "train")
        batch, drawn = self.batch(number), None
        if self.config.objective.task == "rtd":
            drawn = torch.cat(self.drawn[-len(batches) :])
        theirs = self.plain.step(number, batch, drawn)
        self.findings.losses.append(("mlm", figures["train/mlm_loss"], theirs.mlm_loss))
        if drawn is not None:
            self.findings.losses.append(("rtd", figures["train/rtd_loss"], theirs.rtd_loss))
            self.note_flips(number, theirs, drawn, batch.valid)

    def note_flips(self, number, theirs, drawn, valid):
        """Record the draws that differ."""
        for row, slot in ((theirs.drawn != drawn) & valid).nonzero().tolist():
            scores = theirs.scores[row, slot]
            preference = scores[theirs.drawn[row, slot]] - scores[drawn[row, slot]]
            self.findings.flips.append(Flip(number, preference.item()))

    def state(self):
        """(engine, parameter, kind) -> the pipeline's fp32 values, whole."""
        return {
            (name, part.name, kind): values.clone()
            for name, engine in self.rig.engines.by_name.items()
            for part in local_slices(engine, 0)
            for kind, values in part.tensors.items()
        }

    def differences(self, kind="weight", relative=False):
        """Largest difference of each parameter, or of one of Adam's averages.

        `relative` divides by the largest expected value of the parameter.
        """
        differences = {}
        for (engine, name, which), ours in self.state().items():
            if which == kind:
                adam = self.plain.adam[engine]
                theirs = {"weight": adam.weights, "exp_avg": adam.mean, "exp_avg_sq": adam.square}
                expected = theirs[kind][name].detach()
                difference = (ours.view(expected.shape) - expected).abs().max()
                scale = expected.abs().max() if relative else 1.0
                differences[f"{engine}/{name}"] = float(difference / scale)
        return differences


def training_gap(world, objective=None, steps=3, **options):
    """Losses, draws, gradients (by Adam's average) and weights of a few steps, not clipped.

    Weights are compared in units of the learning rate.
    """
    both = SideBySide(world, objective, clipping=0.0, **options)
    for step in range(steps):
        both.step(step)
    averages = both.differences("exp_avg", relative=True)
    return {
        "losses": both.findings.worst_loss(),
        "draws": float(len(both.findings.flips)),
        "weights": max(both.differences().values()) / both.section.generator_learning_rate,
        **{f"average of {name}": difference for name, difference in averages.items()},
    }
