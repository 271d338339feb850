"""Steps of training without a shortcut: both losses, autograd, clipping, AdamW.

Written from the papers and from debertav3-facts.md, sections 3 and 4, for every allowed way to
join the networks. There are no micro batches, ranks, engines or streams of random numbers: a step
takes the whole batch, with its masks and its noise.

    mlm         L_MLM
    decoupled   L_MLM, the generator's step; then lambda L_RTD on the updated E_G, D's step
    joint       L_MLM + lambda L_RTD, one clipping norm and one step for all weights

L_MLM is the mean over masked tokens, L_RTD the mean over tokens that are not padding.
"""

from dataclasses import dataclass, field

import torch

from tests.reference.plain_adamw import PlainAdamW, learning_rate_factor
from tests.reference.plain_encoder import logits_at_once
from tests.reference.rtd_plain import corrupt, discriminator_step, generator_step

SPECIAL_IDS = 4  # [PAD] [CLS] [SEP] [UNK]


@dataclass
class PlainBatch:
    """A whole step's sequences, and everything random about them."""

    ids: torch.Tensor
    mask: torch.Tensor
    masked_ids: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    targets: torch.Tensor
    noise: torch.Tensor | None
    mask_id: int

    @property
    def masked_count(self):
        return int(self.valid.sum())

    @property
    def token_count(self):
        return int(self.mask.sum())


@dataclass
class PlainStep:
    """What a step found; `scores` are those that the draws were made by."""

    mlm_loss: float
    rtd_loss: float = float("nan")
    drawn: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    norms: dict = field(default_factory=dict)


class PlainTraining:
    """One run: `weights[network][name]` are leaves that steps change in place."""

    def __init__(self, config, weights, clipping, logits=logits_at_once):
        """Keep `config`, anything with the fields of `pipeline.config.RunConfig`."""
        self.config, self.objective = config, config.objective
        self.weights, self.logits = weights, logits
        section = config.optimizer
        if self.objective.update == "joint":
            self.adam = {"joint": PlainAdamW(self.flat(), section, clipping)}
        else:
            self.adam = {name: PlainAdamW(w, section, clipping) for name, w in weights.items()}

    def flat(self):
        """All weights under the names of the joint engine."""
        return {f"{n}.{name}": w for n, part in self.weights.items() for name, w in part.items()}

    def factor(self, step):
        """Factor on the peak learning rates of a step."""
        return learning_rate_factor(step, self.config.schedule)

    def rates(self, engine, step):
        """Learning rate of every weight that one optimizer owns."""
        section, factor = self.config.optimizer, self.factor(step)
        peaks = {
            "generator": section.generator_learning_rate,
            "discriminator": section.discriminator_learning_rate or section.generator_learning_rate,
        }
        return {
            name: factor * peaks[name.split(".")[0] if engine == "joint" else engine]
            for name in self.adam[engine].weights
        }

    def predict(self, batch):
        """The generator's losses and draws."""
        drawable = slice(None)
        if not self.objective.draw_special_ids:
            drawable = slice(SPECIAL_IDS, batch.mask_id)
        return generator_step(
            self.weights["generator"],
            self.config.generator,
            batch.masked_ids,
            batch.mask,
            batch.positions,
            batch.valid,
            batch.targets,
            batch.noise,
            self.objective.sampling_temperature,
            enhanced_mask_decoder=self.objective.enhanced_mask_decoder,
            drawable=drawable,
            logits=self.logits,
        )

    def detect(self, batch, drawn):
        """The discriminator's losses on the corrupted batch."""
        corrupted, labels = corrupt(batch.ids, batch.positions, batch.valid, drawn)
        return discriminator_step(
            self.weights["generator"],
            self.weights["discriminator"],
            self.config.discriminator,
            corrupted,
            batch.mask,
            labels,
            sharing=self.objective.embedding_sharing,
            rtd_head=self.objective.rtd_head,
            logits=self.logits,
        )

    def step(self, number, batch, drawn=None):
        """Train on a batch; `drawn` replaces the draws where another side's are to be followed."""
        mlm = self.predict(batch)
        mlm_loss = mlm.loss_sum / batch.masked_count
        found = PlainStep(mlm_loss.item(), drawn=mlm.drawn)
        if self.objective.task == "rtd":
            found.scores = mlm.logits.detach() / self.objective.sampling_temperature + batch.noise
        drawn = mlm.drawn if drawn is None else drawn
        if self.objective.update == "joint":
            self.update("joint", mlm_loss + self.weighted(batch, drawn, found), number, found)
            return found
        self.update("generator", mlm_loss, number, found)
        if self.objective.task == "rtd":
            self.update("discriminator", self.weighted(batch, drawn, found), number, found)
        return found

    def weighted(self, batch, drawn, found):
        """Lambda L_RTD with the weights of this moment; notes L_RTD."""
        rtd_loss = self.detect(batch, drawn).loss_sum / batch.token_count
        found.rtd_loss = rtd_loss.item()
        return self.objective.rtd_loss_weight * rtd_loss

    def update(self, network, loss, number, found):
        """Differentiate a loss with respect to what one optimizer owns, and step."""
        adam = self.adam[network]
        gradients = torch.autograd.grad(loss, list(adam.weights.values()))
        gradients = dict(zip(adam.weights, gradients, strict=True))
        found.norms[network] = adam.step(gradients, self.rates(network, number))
