"""How one model is fine-tuned, once recipe and options are settled."""

from dataclasses import dataclass

from pipeline.evaluate.sift import SiftOptions

_WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class TrainingPlan:
    """How to fine-tune one model."""

    epochs: int
    """Passes over the training examples."""
    learning_rate: float
    """Peak."""
    batch_size: int
    """Examples in a step, of all ranks."""
    warmup_steps: int | None = None
    """At most a tenth of all steps; a tenth where None."""
    bf16: bool = False
    """Whether to compute in bf16 where torch's autocast holds that safe; weights stay fp32."""
    sift: SiftOptions | None = None
    """Adversarial perturbation of the embeddings, if any."""

    def num_warmup_steps(self, num_steps: int) -> int:
        """Bound the warm-up for a small training set.

        Args:
            num_steps: Steps of the training.

        Returns:
            Steps of warm-up, at least 1.
        """
        share = max(1, round(_WARMUP_SHARE * num_steps))
        return share if self.warmup_steps is None else max(1, min(self.warmup_steps, share))
