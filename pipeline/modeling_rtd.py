"""The trained discriminator with its head: which tokens of a text were replaced?

Every exported discriminator holds this file, so that transformers alone can use the head:

    model = AutoModelForPreTraining.from_pretrained("PATH/discriminator", trust_remote_code=True)

The same class is `pipeline.modeling_rtd.DebertaV2ForReplacedTokenDetection` where this project is
installed. It imports nothing of the project. The encoder alone needs no code: `AutoModel` loads it.

Letters: B sequences, L sequence length, D hidden size.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class ReplacedTokenHead(nn.Module):
    """Scores every token: w . GELU(W x_i + b) + c.

    x_i is LayerNorm(h_CLS + h_i), or h_i with config.rtd_head "electra".

    Args:
        config: Of the repository.
    """

    def __init__(self, config: DebertaV2Config):
        super().__init__()
        self.LayerNorm = None
        if getattr(config, "rtd_head", "debertav3") == "debertav3":
            self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Score every token.

        Args:
            hidden_BLD: States after the last layer; row 0 is [CLS].

        Returns:
            [B, L] logits of "replaced".

        Source:
            `replaced_token_detection_model.py` of the release; ELECTRA's `run_pretraining.py`.
        """
        if self.LayerNorm is not None:
            hidden_BLD = self.LayerNorm(hidden_BLD[:, :1] + hidden_BLD)
        return self.classifier(F.gelu(self.dense(hidden_BLD))).squeeze(-1)


class DebertaV2ForReplacedTokenDetection(DebertaV2PreTrainedModel):
    """DebertaV2Model and the head `mask_predictions` of its pre-training.

    Args:
        config: Of the repository; `rtd_head` says which head, "debertav3" where it is not there,
            as in the released models.
    """

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.mask_predictions = ReplacedTokenHead(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a repository, and refuse one that lacks any weight: a random head scores nothing.

        Args:
            pretrained_model_name_or_path: Folder, or name on the hub.
            *args: As of transformers.
            **options: As of transformers.

        Returns:
            The model; with output_loading_info=True also what was found.

        Raises:
            ValueError: A weight is missing or has another shape.
        """
        wants_info = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **options
        )
        model, info = loaded
        lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lost:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold a trained discriminator: "
                f"{', '.join(lost)} missing or of another shape"
            )
        return (model, info) if wants_info else model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> TokenClassifierOutput:
        """Score every token; arguments are those of DebertaV2Model.

        Args:
            input_ids: int64 [B, L].
            attention_mask: int64 [B, L], 0 at padding.
            token_type_ids: int64 [B, L].
            position_ids: int64 [B, L].
            inputs_embeds: [B, L, D], in the place of ids.
            labels: [B, L], 1 where a token was replaced; at padding they do not count.
            **options: As of DebertaV2Model; the answer is always an object.

        Returns:
            `logits` [B, L] of "replaced", without a meaning at padding; with labels `loss`, the
            mean binary cross entropy in nats.
        """
        options.pop("return_dict", None)
        encoded = self.deberta(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **options,
        )
        logits_BL = self.mask_predictions(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            is_token_BL = torch.ones_like(logits_BL, dtype=torch.bool)
            if attention_mask is not None:
                is_token_BL = attention_mask.bool()
            loss = F.binary_cross_entropy_with_logits(
                logits_BL[is_token_BL].float(), labels[is_token_BL].float()
            )
        return TokenClassifierOutput(
            loss=loss,
            logits=logits_BL,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @torch.no_grad()
    def score_text(self, tokenizer: Any, text: str) -> list[tuple[str, float]]:
        """Tell of every token of a text how likely it was replaced.

        Args:
            tokenizer: The repository's.
            text: At most as long as the model takes; the rest is left out.

        Returns:
            Pairs of token and probability, [CLS] and [SEP] left out.
        """
        inputs = tokenizer(
            text, truncation=True, return_tensors="pt", return_special_tokens_mask=True
        )
        is_special = inputs.pop("special_tokens_mask")[0].tolist()
        was_training = self.training
        self.eval()
        logits_BL = self(**inputs.to(self.device)).logits
        self.train(was_training)
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        probabilities = logits_BL[0].float().sigmoid().tolist()
        rows = zip(tokens, probabilities, is_special, strict=True)
        return [(token, probability) for token, probability, special in rows if not special]
