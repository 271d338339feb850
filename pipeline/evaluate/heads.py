"""Models to fine-tune: transformers' own, and two heads over marked places that it does not have.

The authors' code has no model for WSC and WiC and names one for ReCoRD that was not released; these
heads take the mean of a marked place's last states, as SuperGLUE's baselines do.

Letters: B examples, L sequence length, M marked places, D hidden size, C classes.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from data_prep.errors import UserError


class MarkedPairModel(nn.Module):
    """Classes of two marked places, from [CLS] and the mean state of each place.

    Args:
        encoder: A DebertaV2Model.
        num_labels: Classes.
    """

    def __init__(self, encoder: Any, num_labels: int):
        super().__init__()
        self.deberta = encoder
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.classifier = _linear(encoder, 3 * encoder.config.hidden_size, num_labels)

    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, marks_BM2: torch.Tensor
    ) -> torch.Tensor:
        """Compute logits.

        Args:
            input_ids_BL: int64.
            mask_BL: int64, 1 for tokens.
            marks_BM2: int64, two places of tokens [start, end).

        Returns:
            [B, C].
        """
        states_BLD = self.deberta(input_ids_BL, attention_mask=mask_BL).last_hidden_state
        places_BMD = mark_means(states_BLD, marks_BM2)
        joined = torch.cat([states_BLD[:, 0], places_BMD[:, 0], places_BMD[:, 1]], dim=-1)
        return self.classifier(self.dropout(joined))


class EntityModel(nn.Module):
    """How well the entity of each marked place fills the gap, which is the first place.

    Args:
        encoder: A DebertaV2Model.
        num_labels: 1.
    """

    def __init__(self, encoder: Any, num_labels: int):
        super().__init__()
        size = encoder.config.hidden_size
        self.deberta = encoder
        self.dense = _linear(encoder, 2 * size, size)
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.classifier = _linear(encoder, size, num_labels)

    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, marks_BM2: torch.Tensor
    ) -> torch.Tensor:
        """Compute logits.

        Args:
            input_ids_BL: int64.
            mask_BL: int64, 1 for tokens.
            marks_BM2: int64, places of tokens [start, end); the first is the gap.

        Returns:
            [B, M]; the first column means nothing.
        """
        states_BLD = self.deberta(input_ids_BL, attention_mask=mask_BL).last_hidden_state
        places_BMD = mark_means(states_BLD, marks_BM2)
        gap_BMD = places_BMD[:, :1].expand_as(places_BMD)
        hidden_BMD = nn.functional.gelu(self.dense(torch.cat([gap_BMD, places_BMD], dim=-1)))
        return self.classifier(self.dropout(hidden_BMD)).squeeze(-1)


_OWN_HEADS = {"MarkedPairModel": MarkedPairModel, "EntityModel": EntityModel}


def mark_means(states_BLD: torch.Tensor, marks_BM2: torch.Tensor) -> torch.Tensor:
    """Average the states of each marked place.

    Args:
        states_BLD: Last states of the encoder.
        marks_BM2: int64, places of tokens [start, end).

    Returns:
        [B, M, D]; zeros for an empty place.
    """
    positions_L = torch.arange(states_BLD.shape[1], device=states_BLD.device)
    starts, ends = marks_BM2[..., :1], marks_BM2[..., 1:]
    inside_BML = ((positions_L >= starts) & (positions_L < ends)).to(states_BLD.dtype)
    return inside_BML @ states_BLD / inside_BML.sum(-1, keepdim=True).clamp(min=1)


def _linear(encoder: Any, inputs: int, num_outputs: int) -> nn.Linear:
    """Draw a new layer as transformers draws its heads."""
    layer = nn.Linear(inputs, num_outputs)
    nn.init.normal_(layer.weight, std=encoder.config.initializer_range)
    nn.init.zeros_(layer.bias)
    return layer


@contextmanager
def loaded_from(repository: Path) -> Iterator[None]:
    """Say of a repository that transformers refuses what is wrong with it.

    Args:
        repository: The folder.

    Raises:
        UserError: transformers raised something inside.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{repository}: its weights are damaged, or hold Python objects beside the tensors; "
            "such a file can run any program and is not loaded: convert it to model.safetensors "
            "where that may do no harm"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{repository}: transformers cannot load this model ({reason}); name a run, an export, "
            "or a DeBERTa-v2/v3 repository"
        ) from error


def build_model(
    repository: Path, start: str, head: str, num_labels: int, dropout: float | None = None
) -> Any:
    """Build the model of a task, with pre-trained or random weights.

    Args:
        repository: Folder with config.json and weights.
        start: "pretrained" or "random"; the head is random in both.
        head: Name of the class, as in `Kind.head`.
        num_labels: Outputs of the head, where it can have any number.
        dropout: In front of the head's last layer; the model's own where None.

    Returns:
        The model in fp32, on the CPU.

    Raises:
        UserError: transformers cannot load the repository.
    """
    import transformers  # costs seconds to import

    transformers.utils.logging.set_verbosity_error()  # the new head's missing weights are no news
    transformers.utils.logging.disable_progress_bar()
    own_class = _OWN_HEADS.get(head)
    auto_class = transformers.AutoModel if own_class else getattr(transformers, head)
    with loaded_from(repository):
        if start == "pretrained":
            model = auto_class.from_pretrained(
                repository, num_labels=num_labels, dtype=torch.float32, trust_remote_code=False
            )
        else:
            config = transformers.AutoConfig.from_pretrained(
                repository, num_labels=num_labels, trust_remote_code=False
            )
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if own_class is not None:
        model = own_class(model, num_labels)
    if dropout is not None and hasattr(model, "dropout"):
        model.dropout.p = dropout
    return model
