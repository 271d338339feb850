"""SiFT: scale-invariant fine-tuning (DeBERTa, arXiv:2006.03654, section 4), as in DeBERTa/sift.

The perturbation is of the word embeddings after they are normalised to mean 0 and variance 1, so
that its size means the same for every word and model. For one batch:

    1. noise delta ~ N(0, init_perturbation^2), cut at two standard deviations
    2. delta += learning_rate x g / max|g|, a token at a time, with g the gradient of the divergence
       between the outputs of the perturbed embeddings and the clean ones
    3. loss = task loss + lambda x divergence, now with gradients for the weights

The divergence is the symmetric Kullback-Leibler one; of a regression, where a distribution of one
class says nothing, it is the squared difference. As in the authors' code the clean embeddings count
as constants in the perturbed passes, and each side of the divergence as a constant for the other.

Letters: B examples, L sequence length, D hidden size, N distributions, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from data_prep.errors import UserError
from pipeline.evaluate.features import Batch
from pipeline.evaluate.kind import Kind

_EPSILON = 1e-6
_LAYER_NORM_EPSILON = 1e-7
_TARGET = "embeddings.LayerNorm"


@dataclass(frozen=True)
class SiftOptions:
    """Named as in the authors' code; the defaults are those of its scripts for base and small."""

    vat_lambda: float = 5.0
    """Weight of the divergence."""
    vat_learning_rate: float = 1e-4
    """Step of the perturbation."""
    vat_init_perturbation: float = 1e-2
    """Standard deviation of the noise it begins with."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, value in vars(self).items():
            if not 0 < value < 1e3:
                raise UserError(f"--{name.replace('_', '-')} {value}: give a positive number")


def divergence(first_NC: torch.Tensor, second_NC: torch.Tensor) -> torch.Tensor:
    """Compare two sets of outputs.

    Args:
        first_NC: Logits.
        second_NC: Logits.

    Returns:
        [N]: KL(second || first) + KL(first || second), in which the distribution that weights is a
        constant; of one class the squared difference.

    Source: DeBERTa/sift/sift.py, symmetric_kl, less the entropies, which have no gradient there.
    """
    if first_NC.shape[-1] == 1:
        return (first_NC.float() - second_NC.float()).square()[:, 0]
    first, second = first_NC.float().log_softmax(-1), second_NC.float().log_softmax(-1)
    forth = F.kl_div(first, second.detach(), reduction="none", log_target=True)
    back = F.kl_div(second, first.detach(), reduction="none", log_target=True)
    return (forth + back).sum(-1)


class Sift:
    """Perturbs the embeddings of a model from `attach` to `detach`.

    Args:
        model: A model with DeBERTa's embeddings.
        options: Sizes.
    """

    def __init__(self, model: nn.Module, options: SiftOptions):
        self._model, self._options = model, options
        self._normalised_BLD: torch.Tensor | None = None
        self._delta_BLD: torch.Tensor | None = None
        found = [module for name, module in model.named_modules() if name.endswith(_TARGET)]
        if len(found) != 1:
            raise UserError(f"--sift: the model has {len(found)} modules {_TARGET}, not one")
        self._target = found[0]

    def attach(self) -> "Sift":
        """Normalise the embeddings from now on.

        Returns:
            Itself.
        """
        self._handle = self._target.register_forward_pre_hook(self._hook)
        return self

    def detach(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
        """Normalise the embeddings, and perturb them once there is a perturbation."""
        if self._delta_BLD is not None:
            assert self._normalised_BLD is not None, "a clean pass comes first"
            return self._normalised_BLD.detach() + self._delta_BLD.to(self._normalised_BLD.dtype)
        embeddings_BLD = inputs[0]
        size = embeddings_BLD.shape[-1:]
        self._normalised_BLD = F.layer_norm(embeddings_BLD, size, eps=_LAYER_NORM_EPSILON)
        return self._normalised_BLD

    def loss(self, kind: Kind, batch: Batch, clean: torch.Tensor) -> torch.Tensor:
        """Compute the weighted divergence of one batch.

        Args:
            kind: The kind of task.
            batch: The batch of the clean pass, which came last.
            clean: Its logits, with their graph.

        Returns:
            A scalar, to be added to the loss of the task.
        """
        assert self._normalised_BLD is not None, "a clean pass comes first"
        sigma = self._options.vat_init_perturbation
        noise_BLD = torch.randn_like(self._normalised_BLD, dtype=torch.float32) * sigma
        start_BLD = noise_BLD.clamp(-2 * sigma, 2 * sigma)
        try:
            self._delta_BLD = self._worse(kind, batch, clean, start_BLD)
            perturbed = kind.logits(self._model, batch)
        finally:
            self._delta_BLD = None
        both = (kind.distributions(logits, batch) for logits in (perturbed, clean))
        found_N = divergence(*both)
        # A window without an entity has no distribution.
        return self._options.vat_lambda * found_N.sum() / max(1, len(found_N))

    def _worse(
        self, kind: Kind, batch: Batch, clean: torch.Tensor, start_BLD: torch.Tensor
    ) -> torch.Tensor:
        """Take the step towards a larger divergence."""
        start_BLD.requires_grad_()
        self._delta_BLD = start_BLD
        was_trained = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in was_trained:  # their gradients would cost memory and are not asked for
            parameter.requires_grad_(False)
        try:
            perturbed = kind.logits(self._model, batch)
            both = (kind.distributions(logits, batch) for logits in (perturbed, clean.detach()))
            (gradient_BLD,) = torch.autograd.grad(divergence(*both).sum(), start_BLD)
        finally:
            for parameter in was_trained:
                parameter.requires_grad_(True)
        if not torch.isfinite(gradient_BLD).all():
            return start_BLD.detach()
        largest_BL1 = gradient_BLD.abs().amax(-1, keepdim=True)
        step_BLD = gradient_BLD / (_EPSILON + largest_BL1)
        return start_BLD.detach() + self._options.vat_learning_rate * step_BLD
