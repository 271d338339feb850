"""Bytes that a forward pass keeps for its backward pass, tensor by tensor.

Every term is a tensor that autograd saves in `pipeline.modeling`, counted once however many
operations save it, parameters left out; what activation checkpointing holds as arguments counts
too. Tests compare the sums with torch's saved-tensor hooks; those of the `triton` backend, whose
kernels need a GPU, on tensors without storage. It keeps queries, keys, values, both projections of
the table, its context and one log-sum-exp a row, and leaves selected query rows to `torch`.

Letters: B sequences, L sequence length, K masked slots, Q query rows, D hidden size, F inner width,
E width of the word table, H heads, R relative rows; n = H B Q L scores.
"""

from dataclasses import dataclass

from pipeline.config import NetworkSection, ObjectiveSection, RunConfig

CHUNK_IDS = 16_384
"""Ids whose logits exist at once: that of `pipeline.modeling.vocabulary_head`."""
FUSED_HEAD_SIZES = (32, 64, 128)
"""Head sizes that fused kernels serve."""
_WORD_PIECES = 8
"""Room for one whole word: MAX_WORD_PIECES of `pipeline.masking_words`."""
_FP32, _INT64, _BOOL = 4, 8, 1
_ELEMENTS_A_BYTE = 8  # of a dropout mask that a compiled graph draws
_STATISTICS = 2  # of a LayerNorm's row: mean and reciprocal deviation


def masked_slots(sequence_length: int, objective: ObjectiveSection) -> int:
    """Count the slots of a sequence, as `pipeline.masking.num_masked_slots`.

    Args:
        sequence_length: Tokens, [CLS] and [SEP] included.
        objective: Share, law and unit.

    Returns:
        K.
    """
    quota = max(1, round(objective.mask_prob * sequence_length))
    if objective.whole_word_masking and objective.masking_law == "windowed":
        return min(sequence_length, quota + _WORD_PIECES - 1)
    return quota


@dataclass(frozen=True)
class Activations:
    """What one network's forward pass of one micro batch keeps.

    Attributes:
        config: The run.
        network: The network's section.
        sequences: B.
        length: L.
        weight_bytes: 2 in bf16 and fp16, 4 in fp32.
    """

    config: RunConfig
    network: NetworkSection
    sequences: int
    length: int
    weight_bytes: int

    @property
    def _slots(self) -> int:
        return masked_slots(self.length, self.config.objective)

    @property
    def _tokens(self) -> int:
        return self.sequences * self.length

    @property
    def _table_bytes(self) -> int:
        """One copy of the relative table, [R, D]."""
        if not self.network.relative_attention:
            return 0
        return 2 * self.network.position_buckets * self.network.hidden_size * self.weight_bytes

    def _states(self, rows: int, width: int | None = None) -> int:
        """Bytes of [rows, D], or of another width."""
        return rows * (self.network.hidden_size if width is None else width) * self.weight_bytes

    @property
    def _drops_hidden(self) -> bool:
        return self.network.hidden_dropout_prob > 0.0

    @property
    def is_compiled(self) -> bool:
        """Whether dropout masks are bits instead of tensors like what they mask."""
        return self.config.model.compile == "layer"

    def _masks(self, tensor_bytes: int, element_bytes: int | None = None) -> int:
        """Dropout masks of activations of so many bytes."""
        if not self._drops_hidden:
            return 0
        element = self.weight_bytes if element_bytes is None else element_bytes
        return tensor_bytes // element // _ELEMENTS_A_BYTE if self.is_compiled else tensor_bytes

    def generator_bytes(self) -> int:
        """Sum what the generator keeps: embeddings, layers, decoder, head.

        Returns:
            Bytes.
        """
        rows, passes = self.sequences * self._slots, self._decoder_passes
        embeddings = self._embeddings(is_wide=self.network.position_biased_input)
        last = self.network.num_hidden_layers - 1
        layers = last * self._layer() + self._convolution() + self._context()
        ids = self._tokens * _INT64 + rows * (2 * _INT64 + _BOOL + _INT64)
        return embeddings + layers + self._decoder(passes) + self._mlm_head(rows) + ids

    def discriminator_bytes(self) -> int:
        """Sum what the discriminator keeps: embeddings, layers, head.

        Returns:
            Bytes.
        """
        sharing = self.config.objective.embedding_sharing
        is_wide = sharing != "nes" or self.network.position_biased_input
        layers = self.network.num_hidden_layers * self._layer() + self._convolution()
        ids, logits = self._tokens * _INT64, 2 * self._tokens * _FP32
        head = self._rtd_head()
        return self._embeddings(is_wide) + layers + self._context() + head + ids + logits

    def recomputed_bytes(self) -> int:
        """Size what one layer's backward pass brings back under activation checkpointing.

        Returns:
            Bytes; 0 where nothing is recomputed.
        """
        kind = self.config.model.activation_checkpointing
        if kind == "full":
            return self._whole_layer(self._attention_core(self.length)) - self._states(self._tokens)
        if kind == "attention":
            core = self._attention_core(self.length) - self._attention_arguments(self._tokens)
            return max(0, core)
        return 0

    def behind_attention_bytes(self) -> int:
        """Size what a layer keeps behind its attention, which its backward pass frees first.

        Returns:
            Bytes.
        """
        return self._behind_attention(self._tokens)

    def behind_layers_bytes(self, is_generator: bool) -> int:
        """Size what the network keeps behind its last layer of self-attention.

        Args:
            is_generator: Whether that is a decoder and a vocabulary head, or a head of one logit.

        Returns:
            Bytes.
        """
        if not is_generator:
            return self._rtd_head()
        head = self._mlm_head(self.sequences * self._slots)
        return head + self._decoder(self._decoder_passes)

    def relative_table_bytes(self, is_decoder: bool) -> int:
        """Sum the copies of the relative table that all layers keep; a part of the whole.

        Args:
            is_decoder: Whether the last layer is the generator's decoder.

        Returns:
            Bytes.
        """
        if not self.network.relative_attention:
            return 0
        layers = self.network.num_hidden_layers
        uses = layers - 1 + (self._decoder_passes if is_decoder else 1)
        kind = self.config.model.activation_checkpointing
        if kind == "full":
            # The decoder's keys are projected outside of what is recomputed.
            decoder = self._decoder_passes if self._drops_hidden else 1
            projected = 2 * self._table_bytes * decoder if is_decoder else 0
            dropped = self._dropped_table() * self._decoder_passes if is_decoder else 0
            return self._context() + projected + dropped
        each, backend = 2 * self._table_bytes, self.backend_for(self.length)
        if kind == "none" and backend == "torch":
            each = 2 * self._states(2 * self.length)
        elif kind == "none" and backend == "eager":
            each = 2 * self.sequences * self._table_bytes
        return self._context() + uses * (each + self._dropped_table())

    @property
    def _decoder_passes(self) -> int:
        return 2 if self.config.objective.enhanced_mask_decoder else 1

    def _embeddings(self, is_wide: bool) -> int:
        """Projection, LayerNorm and dropout of the sum of tables, which may be fp32."""
        narrow = self.network.word_embedding_size != self.network.hidden_size
        wide = _FP32 if is_wide and not narrow else self.weight_bytes
        kept = self._tokens * self.network.hidden_size * wide
        projected = self._states(self._tokens, self.network.word_embedding_size) if narrow else 0
        return projected + kept + self._masks(kept, wide) + self._layer_norms(self._tokens, 1)

    def _layer_norms(self, rows: int, count: int) -> int:
        """Statistics of LayerNorms over some rows."""
        return count * rows * _STATISTICS * _FP32

    def _context(self) -> int:
        """The relative table: its rows before the LayerNorm, and behind it where it is used."""
        checkpoints = self.config.model.activation_checkpointing == "full"
        return self._table_bytes * (1 if self._drops_hidden and not checkpoints else 2)

    def _layer(self) -> int:
        """One layer of self-attention, as activation checkpointing leaves it."""
        kind = self.config.model.activation_checkpointing
        if kind == "full":
            return self._states(self._tokens)
        if kind == "none":
            return self._whole_layer(self._attention_core(self.length))
        return self._whole_layer(self._attention_arguments(self._tokens))

    def _attention_arguments(self, query_rows: int) -> int:
        """What checkpointed attention holds: queries, keys, values, both projected tables."""
        return self._states(query_rows + 2 * self._tokens) + 2 * self._table_bytes

    def _whole_layer(self, attention: int) -> int:
        """Input, projected table, attention, and the blocks behind it."""
        return self._key_side() + attention + self._behind_attention(self._tokens)

    def _key_side(self) -> int:
        """Input of the projections, and the table with its dropout mask."""
        return self._states(self._tokens) + self._dropped_table()

    def _dropped_table(self) -> int:
        return self._table_bytes + self._masks(self._table_bytes) if self._drops_hidden else 0

    def _behind_attention(self, rows: int) -> int:
        """Output block and feed-forward block: dense inputs, masks, LayerNorm inputs, GELU."""
        # The context, both LayerNorms' inputs, and the first one's output.
        hidden = self._states(4 * rows) + 2 * self._masks(self._states(rows))
        inner = 2 * self._states(rows, self.network.intermediate_size)
        return hidden + inner + self._layer_norms(rows, 2)

    def backend_for(self, queries: int) -> str:
        """Say which backend computes some query rows.

        Args:
            queries: Query rows of a sequence.

        Returns:
            That of the configuration, or "torch" where fused kernels do not serve: for selected
            rows, and for other head sizes.
        """
        backend = self.config.model.attention_backend
        serves = queries == self.length and self.network.attention_head_size in FUSED_HEAD_SIZES
        return backend if backend in ("eager", "torch") or serves else "torch"

    def _attention_core(self, queries: int) -> int:
        """What attention itself keeps for some query rows a sequence."""
        backend = self.backend_for(queries)
        rows = self.sequences * queries
        scores = self.network.num_attention_heads * rows * self.length
        own = self._states(rows + 2 * self._tokens)  # queries, keys, values
        if backend == "eager":
            return own + self._eager_extra(queries, scores)
        relative = self.network.relative_attention
        if backend == "torch":
            # Both tables, one row a distance; probabilities and the dropout mask.
            tables = 2 * self._states(2 * self.length) if relative else 0
            drops = self.network.attention_probs_dropout_prob > 0.0
            mask = scores // _ELEMENTS_A_BYTE if self.is_compiled else scores * _BOOL
            return own + tables + scores * self.weight_bytes + (mask if drops else 0)
        # The context is the next projection's input: not counted twice.
        log_sums = self.network.num_attention_heads * rows * _FP32
        return own + 2 * self._table_bytes + log_sums

    def _eager_extra(self, queries: int, scores: int) -> int:
        """Operands of the position terms, and probabilities up to three times."""
        kept, wide = 0, max(_FP32, self.weight_bytes)
        if self.network.relative_attention:
            # A product with a table that several sequences share copies it for each of them, and
            # the queries and keys once more; a gather keeps what it reads; the index is int64.
            both_rows = self.sequences * queries + self._tokens
            copied = self._states(both_rows) if self.sequences > 1 else 0
            kept += copied + 2 * self.sequences * self._table_bytes
            heads, columns = self.network.num_attention_heads, 2 * self.network.position_buckets
            kept += self._states(heads * both_rows, columns)
            rows = self.length if queries == self.length else self.sequences * queries
            kept += rows * self.length * _INT64
        dropped = self.network.attention_probs_dropout_prob > 0.0
        narrow = 2 * self.weight_bytes if dropped else self.weight_bytes % wide
        return kept + scores * (wide + narrow)

    def _decoder(self, passes: int) -> int:
        """The last layer at the masked slots: keys once, then one or two passes over the slots."""
        kind, rows = self.config.model.activation_checkpointing, self.sequences * self._slots
        keys = self._key_side()
        again = self._dropped_table() if self._drops_hidden else 0
        keys += (passes - 1) * again
        states = passes * self._states(rows) + rows * _INT64  # inputs, and which rows they are
        if kind == "full":
            tables = 2 * self._table_bytes * (passes if self._drops_hidden else 1)
            return keys + states + self._states(2 * self._tokens) + tables
        if kind == "attention":
            core = self._attention_arguments(rows)
            tables = 0 if self._drops_hidden else 2 * self._table_bytes
            each = core - self._states(2 * self._tokens) - tables
            shared = self._states(2 * self._tokens) + tables
        else:
            core = self._attention_core(self._slots)
            # The torch backend makes the keys contiguous in each pass, but has one copy of values;
            # eager copies both, where there are several sequences.
            shared = self._states(self._tokens) if self._keeps_values else 0
            if not self._keeps_values and self.sequences == 1:
                shared = self._states(2 * self._tokens)
            each = core - shared
        return keys + states + shared + passes * (each + self._behind_attention(rows))

    @property
    def _keeps_values(self) -> bool:
        return self.config.model.attention_backend != "eager"

    def _convolution(self) -> int:
        """Mask, activation and the LayerNorm's input of the convolution beside the first layer."""
        if not self.network.conv_kernel_size:
            return 0
        if self.config.model.activation_checkpointing == "full":
            return self._states(self._tokens)
        kept = self._states(2 * self._tokens) + self._masks(self._states(self._tokens))
        return kept + self._layer_norms(self._tokens, 1)

    def _mlm_head(self, rows: int) -> int:
        """Dense input, GELU's and the LayerNorm's input and output, maxima and sums."""
        inner = 3 * self._states(rows, self.network.word_embedding_size)
        return self._states(rows) + inner + self._layer_norms(rows, 1) + 2 * rows * _FP32

    def _rtd_head(self) -> int:
        """Dense input, GELU's input and output; the LayerNorm's input where there is one."""
        has_norm = self.config.objective.rtd_head == "debertav3"
        kept = self._states((4 if has_norm else 3) * self._tokens)
        return kept + (self._layer_norms(self._tokens, 1) if has_norm else 0)


def activation_bytes(
    config: RunConfig, sequences: int, length: int, weight_bytes: int
) -> dict[str, int]:
    """Count what each network keeps of a micro batch.

    Args:
        config: The run.
        sequences: Micro batch of one GPU.
        length: Tokens in a sequence.
        weight_bytes: Bytes of a weight in the forward pass: 2 or 4.

    Returns:
        Network -> bytes at the end of its forward pass.
    """
    parts = {}
    for name, network in config.networks.items():
        kept = Activations(config, network, sequences, length, weight_bytes)
        is_generator = name == "generator"
        parts[name] = kept.generator_bytes() if is_generator else kept.discriminator_bytes()
    return parts
