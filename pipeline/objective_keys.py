"""The random functions of the objective, masks and draws, for one run and sequence length."""

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import Key, stream_key
from pipeline.masking import MaskedBatch, MaskingVocabulary, MaskKeys, choose_masks
from pipeline.rtd import DrawKey
from pipeline.sequences import SequenceBatch


class ObjectiveKeys:
    """Masks and names the noise of micro batches.

    Args:
        objective: Masking, temperature, and which ids may be drawn.
        seed: The run's seed.
        sequence_length: L.
        vocabulary: Of the data's tokenizer.
        split: "train" or "heldout": separate streams.
    """

    def __init__(
        self,
        objective: ObjectiveSection,
        seed: int,
        sequence_length: int,
        vocabulary: MaskingVocabulary,
        split: str,
    ) -> None:
        self._objective = objective
        self._vocabulary = vocabulary
        self._mask_keys = MaskKeys.derive(seed, split, sequence_length)
        self._draw_key: Key = stream_key(seed, f"draw/{split}", sequence_length)

    def mask(self, batch: SequenceBatch) -> MaskedBatch:
        """Choose the masked slots of a micro batch and hide their tokens.

        Args:
            batch: On the device.

        Returns:
            The masked batch.
        """
        # Kept where the batches are, so that the table of words is copied once.
        self._vocabulary = self._vocabulary.to(batch.input_ids_BL.device)
        return choose_masks(
            batch.input_ids_BL,
            batch.lengths_B,
            batch.sample_words_B2,
            self._objective,
            self._mask_keys,
            self._vocabulary,
        )

    def draw(self, batch: SequenceBatch) -> DrawKey | None:
        """Name the noise of a micro batch's draws.

        Args:
            batch: On the device.

        Returns:
            The key; None for masked language modelling alone, which draws nothing.
        """
        if self._objective.task == "mlm":
            return None
        objective = self._objective
        allowed_ids = None if objective.draw_special_ids else self._vocabulary.text_ids
        return DrawKey(
            self._draw_key, batch.sample_words_B2, objective.sampling_temperature, allowed_ids
        )
