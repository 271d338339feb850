"""Both networks as one module: what is trained jointly, evaluated, loaded and exported.

    masked ids -> generator -> draws -> corrupted ids -> rows of E_G -> discriminator

Under decoupled training the two halves of this path are two phases of the step with an update
between them (`pipeline.step`). With objective.task=mlm there is no second half.

Letters: B sequences, L sequence length, E width of the word table.
"""

from typing import NamedTuple

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.counter_rng import DropoutKey
from pipeline.masking import MaskedBatch
from pipeline.modeling.networks import Discriminator, Generator, RtdOutput, init_weights
from pipeline.modeling.vocabulary_head import MlmOutput
from pipeline.rtd import CorruptedBatch, DrawKey, corrupt
from pipeline.sequences import SequenceBatch


class PairOutput(NamedTuple):
    """What both networks report of a micro batch; the last two are None with objective.task=mlm."""

    mlm: MlmOutput
    rtd: RtdOutput | None
    corrupted: CorruptedBatch | None


class NetworkPair(nn.Module):
    """The generator and, for replaced token detection, the discriminator.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        objective = config.objective
        self.generator = Generator(config.generator, config.model, objective)
        self.discriminator = None
        if config.discriminator is not None:
            self.discriminator = Discriminator(config.discriminator, config.model, objective)
        self.update = objective.update

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        slots: MaskedBatch,
        draw: DrawKey | None,
        generator_dropout: DropoutKey | None = None,
        discriminator_dropout: DropoutKey | None = None,
    ) -> PairOutput:
        """Predict, draw, corrupt and detect.

        Args:
            input_ids_BL: int64 [B, L], the original tokens.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            slots: What is masked.
            draw: What the draws depend on; None with objective.task=mlm.
            generator_dropout: Dropout of this micro step; None outside training.
            discriminator_dropout: Likewise.

        Returns:
            Both outputs. Gradients of the second flow into E_G with embedding_sharing "es" alone.
        """
        mlm = self.generator(
            slots.masked_ids_BL,
            attention_mask_BL,
            slots.positions_BK,
            slots.valid_BK,
            slots.targets_BK,
            draw,
            generator_dropout,
        )
        if self.discriminator is None:
            return PairOutput(mlm, None, None)
        assert mlm.drawn_BK is not None, "replaced token detection without draws"
        corrupted = corrupt(input_ids_BL, slots.positions_BK, slots.valid_BK, mlm.drawn_BK)
        rtd = self.discriminator(
            corrupted.input_ids_BL,
            shared_rows(self.generator, self.discriminator, corrupted.input_ids_BL),
            attention_mask_BL,
            corrupted.is_replaced_BL.float(),
            discriminator_dropout,
        )
        return PairOutput(mlm, rtd, corrupted)

    def predict(self, batch: SequenceBatch, slots: MaskedBatch, draw: DrawKey | None) -> PairOutput:
        """Compute both losses of a micro batch without dropout.

        Args:
            batch: On the module's device.
            slots: Its masked slots.
            draw: What its draws depend on.

        Returns:
            Both outputs.
        """
        return self(batch.input_ids_BL, batch.attention_mask(), slots, draw)

    def trained_modules(self) -> dict[str, nn.Module]:
        """Say what an optimizer each is for.

        Returns:
            "generator" and "discriminator"; "joint", this module; or "generator" alone. A commit
            has a folder of each name.
        """
        if self.discriminator is None:
            return {"generator": self.generator}
        if self.update == "joint":
            return {"joint": self}
        return {"generator": self.generator, "discriminator": self.discriminator}

    def init_weights(self, seed: int) -> None:
        """Fill all weights as functions of the run's seed.

        Args:
            seed: The run's seed.
        """
        init_weights(self.generator, seed)
        if self.discriminator is not None:
            init_weights(self.discriminator, seed + 1)


def shared_rows(
    generator: Generator, discriminator: Discriminator, ids_BL: torch.Tensor
) -> torch.Tensor | None:
    """Look up what the discriminator's embeddings take from the generator.

    Args:
        generator: The owner of E_G.
        discriminator: Whoever reads it.
        ids_BL: int64 [B, L].

    Returns:
        fp32 [B, L, E], with a gradient for "es" alone; None for "nes".
    """
    embeddings = discriminator.deberta.embeddings
    if embeddings.sharing == "nes":
        return None
    with torch.set_grad_enabled(embeddings.sharing == "es" and torch.is_grad_enabled()):
        return generator.token_embeddings(ids_BL, embeddings.position_biased_input)
