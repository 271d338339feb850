"""Wrong choices that re-implementations have made, each as one patch of the pipeline.

A mutation takes pytest's monkeypatch and changes exactly one choice; `tests/numerics/
test_mutations.py` says which judge must notice. Where they come from: debertav3-facts.md, end of
section 8 (third-party re-implementations and their defects) and section 9 (traps).
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from pipeline import objective_keys, optimizer, rtd, step
from pipeline.modeling import (
    attention,
    embeddings,
    encoder,
    heads,
    layer,
    networks,
    pair,
    vocabulary_head,
    vocabulary_sums,
)
from pipeline.rtd import CorruptedBatch


def argmax_for_sampling(patch):
    def silence(words, positions, first_id, num_ids, key):
        return torch.zeros(*positions.shape, num_ids)

    patch.setattr(vocabulary_sums, "gumbel_noise", silence)


def temperature_ignored(patch):
    original = heads.vocabulary_head

    def head(*arguments, **options):
        return original(*arguments[:-1], replace(arguments[-1], temperature=1.0), **options)

    patch.setattr(heads, "vocabulary_head", head)


def special_ids_never_drawn(patch):
    original = objective_keys.ObjectiveKeys.draw

    def draw(self, batch):
        return replace(original(self, batch), allowed_ids=self._vocabulary.text_ids)

    patch.setattr(objective_keys.ObjectiveKeys, "draw", draw)


def position_to_content_of_key_minus_query(patch):
    original = encoder.relative_positions

    def mirrored(*arguments):
        geometry = original(*arguments)
        return replace(geometry, key_rows_E=geometry.query_rows_E)

    patch.setattr(encoder, "relative_positions", mirrored)


def scale_of_one_term(patch):
    third = SimpleNamespace(sqrt=lambda number: np.sqrt(number / 3), float32=np.float32)
    patch.setattr(attention, "np", third)


def position_projections_without_bias(patch):
    original = layer.DisentangledSelfAttention.key_side

    def key_side(self, *arguments):
        keys = original(self, *arguments)
        shape = (-1, 1, self.head_size)
        return replace(
            keys,
            rel_key_HRd=keys.rel_key_HRd - self.key_proj.bias.view(shape),
            rel_query_HRd=keys.rel_query_HRd - self.query_proj.bias.view(shape),
        )

    patch.setattr(layer.DisentangledSelfAttention, "key_side", key_side)


def relative_table_without_layer_norm(patch):
    original = encoder.Encoder._context

    def context(self, *arguments):
        return replace(original(self, *arguments), relative_table_RD=self.rel_embeddings.weight)

    patch.setattr(encoder.Encoder, "_context", context)


def far_distances_not_clamped(patch):
    original = encoder.relative_positions
    patch.setattr(
        encoder, "relative_positions", lambda *given: original(*given[:-1], "transformers")
    )


def gelu_by_tanh(patch):
    approximate = SimpleNamespace(**{**vars(F), "gelu": lambda x: F.gelu(x, approximate="tanh")})
    patch.setattr(layer, "F", approximate)


def decoder_input_with_layer_norm(patch):
    original = encoder.Encoder.decode

    def decode(self, hidden, mask, key, positions, rows=None):
        rows = None if rows is None else F.layer_norm(rows, rows.shape[-1:])
        return original(self, hidden, mask, key, positions, rows)

    patch.setattr(encoder.Encoder, "decode", decode)


def decoder_applied_once(patch):
    original = layer.EncoderLayer.forward

    def forward(self, query, context, number, keys=None):
        is_second_pass = keys is not None and number == 2  # behind layers 0 and 1
        return query if is_second_pass else original(self, query, context, number, keys)

    patch.setattr(layer.EncoderLayer, "forward", forward)


def no_decoder(patch):
    original = encoder.Encoder.decode
    patch.setattr(encoder.Encoder, "decode", lambda self, *given: original(self, *given[:4]))


def mlm_head_normalizes_first(patch):
    def forward(self, hidden, table, *arguments):
        x = F.gelu(self.dense(self.LayerNorm(hidden)))
        return vocabulary_head.vocabulary_head(x, table.weight, self.bias, *arguments)

    patch.setattr(heads.MlmHead, "forward", forward)


def rtd_head_normalizes_last(patch):
    def forward(self, hidden):
        x = self.LayerNorm(F.gelu(self.dense(hidden[:, :1] + hidden)))
        return self.classifier(x).squeeze(-1)

    patch.setattr(heads.RtdHead, "forward", forward)


def no_addition_of_cls(patch):
    def forward(self, hidden):
        return self.classifier(F.gelu(self.dense(self.LayerNorm(hidden)))).squeeze(-1)

    patch.setattr(heads.RtdHead, "forward", forward)


def _patch_corruption(patch, change):
    original = rtd.corrupt

    def corrupt(ids, positions, valid, drawn):
        return change(original(ids, positions, valid, drawn), ids, positions, valid)

    for module in (rtd, step, pair):
        patch.setattr(module, "corrupt", corrupt)


def labels_are_the_masked_positions(patch):
    def change(corrupted, ids, positions, valid):
        is_masked = torch.zeros(ids.shape).scatter_add(1, positions, valid.float()) > 0
        return corrupted._replace(is_replaced_BL=is_masked)

    _patch_corruption(patch, change)


def labels_of_the_other_polarity(patch):
    _patch_corruption(patch, lambda corrupted, *rest: CorruptedBatch(corrupted[0], ~corrupted[1]))


def discriminator_reads_masks(patch):
    def change(corrupted, ids, positions, valid):
        masked = ids.clone()
        masked[torch.zeros(ids.shape).scatter_add(1, positions, valid.float()) > 0] = 60
        return corrupted._replace(input_ids_BL=masked)

    _patch_corruption(patch, change)


def _patch_discriminator_loss(patch, counted):
    def forward(self, ids, base, mask, labels, dropout):
        logits = self.mask_predictions(self.encode(ids, base, mask, dropout))
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )
        return networks.RtdOutput((losses * counted(ids, mask)).sum(), logits)

    patch.setattr(networks.Discriminator, "forward", forward)


def padding_in_the_discriminators_loss(patch):
    _patch_discriminator_loss(patch, lambda ids, mask: torch.ones_like(ids))


def cls_not_in_the_discriminators_loss(patch):
    _patch_discriminator_loss(patch, lambda ids, mask: mask & (torch.arange(ids.shape[1]) > 0))


def gradient_of_d_reaches_the_generator(patch):
    def forward(self, ids, base, mask, dropout):
        total = embeddings._wide_sum(base, self._own_rows(ids))
        return self.normalize(total, mask, dropout)

    def rows(generator, discriminator, ids):
        return generator.token_embeddings(ids, False)

    patch.setattr(embeddings.DiscriminatorEmbeddings, "forward", forward)
    patch.setattr(pair, "shared_rows", rows)


def shared_embeddings_without_gradient(patch):
    original = pair.shared_rows

    def rows(*arguments):
        with torch.no_grad():
            return original(*arguments)

    patch.setattr(pair, "shared_rows", rows)


def no_delta(patch):
    original = embeddings.DeltaEmbedding.forward
    patch.setattr(embeddings.DeltaEmbedding, "forward", lambda self, ids: original(self, ids) * 0.0)


def padding_row_learns(patch):
    def forward(self, ids):
        return F.embedding(ids, self._weight)

    patch.setattr(embeddings.DeltaEmbedding, "forward", forward)


def half_precision_sum_of_tables(patch):
    def narrow_sum(left, right):
        return (left.bfloat16() + right.bfloat16()).float()

    patch.setattr(embeddings, "_wide_sum", narrow_sum)


def embeddings_not_masked(patch):
    original = embeddings._Embeddings.normalize

    def normalize(self, rows, mask, key):
        return original(self, rows, None, key)

    patch.setattr(embeddings._Embeddings, "normalize", normalize)


def no_lambda(patch):
    one = property(lambda self: 1.0, lambda self, value: None)
    patch.setattr(step.TrainingStep, "_rtd_loss_weight", one, raising=False)


def embeddings_before_their_update(patch):
    def phases(self, number, batches, slots, draws, scales, sums, prepare):
        corrupted = self.generator_phase(
            number, batches, slots, draws, scales.per_masked_token, sums
        )
        self.discriminator_phase(number, batches, corrupted, scales.per_token, sums)
        generator = self.update("generator", number, prepare)
        discriminator = self.update("discriminator", number, prepare, sums)
        return {"generator": generator, "discriminator": discriminator}

    patch.setattr(step.DecoupledStep, "phases", phases)


def draws_after_the_update(patch):
    def phases(self, number, batches, slots, draws, scales, sums, prepare):
        self.generator_phase(number, batches, slots, draws, scales.per_masked_token, sums)
        outcome = self.update("generator", number, prepare)
        corrupted = []
        with torch.no_grad():
            for each in zip(batches, slots, draws, strict=True):
                drawn = step._generate(self._engines["generator"], *each).drawn_BK
                corrupted.append(step._corrupted(*each[:2], drawn))
        self.discriminator_phase(number, batches, corrupted, scales.per_token, sums)
        return {
            "generator": outcome,
            "discriminator": self.update("discriminator", number, prepare, sums),
        }

    patch.setattr(step.DecoupledStep, "phases", phases)


def empty_slots_in_the_denominator(patch):
    original = step.TrainingStep._scales

    def scales(self, batches, slots):
        every = [each._replace(valid_BK=torch.ones_like(each.valid_BK)) for each in slots]
        return original(self, batches, every)

    patch.setattr(step.TrainingStep, "_scales", scales)


def padding_in_the_denominator(patch):
    original = step.TrainingStep._scales

    def scales(self, batches, slots):
        length = batches[0].input_ids_BL.shape[1]
        full = [replace(b, lengths_B=torch.full_like(b.lengths_B, length)) for b in batches]
        return original(self, full, slots)

    patch.setattr(step.TrainingStep, "_scales", scales)


def delta_does_not_decay(patch):
    patch.setattr(optimizer, "NO_DECAY_NAMES", (*optimizer.NO_DECAY_NAMES, "_weight"))


def biases_decay(patch):
    patch.setattr(optimizer, "NO_DECAY_NAMES", ("LayerNorm.weight",))


def no_bias_correction(patch):
    patch.setattr(optimizer, "AdamW", optimizer.UncorrectedAdamW)
