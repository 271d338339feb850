"""The sections of RunConfig that say what the networks are and what they learn.

    Section             base of all sections: immutable, unknown keys refused
    NetworkSection      [generator] and [discriminator]
    ModelSection        [model]: what both have in common
    ObjectiveSection    [objective]: the task, the masks, and how the networks are joined

The rest of the configuration and the rules between sections are in `pipeline.config`.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: immutable, strict about names, documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Find values that are valid one by one but not together.

        Yields:
            The key, relative to this section, and what is wrong with it.
        """
        yield from ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        """Raise all contradictions of this section as one error."""
        if problems := list(self.contradictions()):
            text = "; ".join(f"{key} {words}" for key, words in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "all": problems})
        return self


class NetworkSection(Section):
    """[generator] and [discriminator]: one encoder each, field names of DebertaV2Config."""

    hidden_size: PositiveInt
    """Width of every layer."""
    embedding_size: PositiveInt | None = None
    """Width of the word table, projected to hidden_size; hidden_size itself where not given."""
    num_hidden_layers: PositiveInt
    """Encoder layers; the enhanced mask decoder needs two."""
    num_attention_heads: PositiveInt
    """Attention heads; must divide hidden_size."""
    intermediate_size: PositiveInt
    """Inner width of the feed-forward block."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout after the embeddings, after each dense output and on the relative table."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout on attention probabilities."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: PositiveFloat = 1e-7
    """Epsilon of every LayerNorm."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence, and the clamp of relative distances before bucketing."""
    relative_attention: bool = True
    """Disentangled attention; without it, that of BERT, which must find positions in the input."""
    position_buckets: Annotated[int, Field(ge=2)] = 256
    """Half the rows of the relative table: logarithmic buckets of signed distance."""
    max_relative_positions: Annotated[int, Field(ge=-1)] = -1
    """Distance at which the buckets end; -1 is max_position_embeddings. A longer context keeps the
    buckets that a model has learned with the value of the shorter one."""
    relative_position_rule: Literal["clamp", "transformers"] = "clamp"
    """Farther distances: the released code clamps them; transformers buckets on, so that all keys
    too far ahead share a row that shorter sequences never train."""
    position_biased_input: bool = False
    """Absolute positions are added to the word embeddings, as in BERT and ELECTRA."""
    conv_kernel_size: NonNegativeInt = 0
    """Width of the convolution beside the first layer (DeBERTa-v2-xlarge has 3); 0 is none."""
    conv_act: Literal["tanh", "gelu", "relu"] = "tanh"
    """Activation of the convolution."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Sizes that do not divide, buckets without room for the logarithm, blind attention."""
        if self.hidden_size % self.num_attention_heads:
            yield (
                "num_attention_heads",
                f"{self.num_attention_heads} does not divide hidden_size {self.hidden_size}",
            )
        exact, last = self.position_buckets // 2, self.last_relative_position
        if self.relative_attention and last <= exact:
            yield (
                "position_buckets",
                f"{self.position_buckets} gives every distance up to {exact} a bucket of its own,"
                f" but distances end at {last}; write at most {2 * (last - 1)}",
            )
        if self.max_relative_positions in (0, 1):
            yield "max_relative_positions", "leaves no distance; write -1 or at least 2"
        if not self.relative_attention and not self.position_biased_input:
            yield (
                "relative_attention",
                "is false and position_biased_input too: nothing would tell positions apart;"
                " set one of them to true",
            )
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            yield (
                "conv_kernel_size",
                f"{self.conv_kernel_size} is even and would shift the tokens; write an odd number",
            )
        if self.conv_kernel_size and self.num_hidden_layers < 2:
            yield (
                "conv_kernel_size",
                "needs num_hidden_layers of at least 2: it runs beside the first layer, and the"
                " last is computed where tokens are predicted",
            )

    @property
    def word_embedding_size(self) -> int:
        """Width of the word table: embedding_size, or hidden_size where that is not given."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def clamps_distances(self) -> bool:
        """Whether sequences can be so long that distances are clamped."""
        reach = self.max_position_embeddings - 1
        clamps = self.relative_attention and self.relative_position_rule == "clamp"
        return clamps and self.last_relative_position < reach

    @property
    def last_relative_position(self) -> int:
        """Largest distance that has a bucket of its own: max_relative_positions - 1."""
        end = self.max_relative_positions
        return (self.max_position_embeddings if end < 1 else end) - 1

    @property
    def attention_head_size(self) -> int:
        """Width of one head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads


class ModelSection(Section):
    """[model]: what both networks have in common."""

    vocab_size: PositiveInt = 128_100
    """Rows of the word table: pieces + [MASK], padded to a multiple of 100."""
    attention_backend: Literal["eager", "torch", "triton", "disentangled_flash"] = "torch"
    """`eager` is the definition; `torch` the same numbers with less memory traffic; `triton` fused
    kernels for a GPU, of attention and of the vocabulary head; `disentangled_flash` the package of
    that name, for comparison."""
    compile: Literal["none", "layer"] = "none"
    """`layer` makes one pass of what lies between matrix products (torch.compile); needs Triton on
    a GPU, a C++ compiler on a CPU."""
    activation_checkpointing: Literal["none", "attention", "full"] = "none"
    """Recompute nothing, each layer's attention, or each whole layer in the backward pass."""


class ObjectiveSection(Section):
    """[objective]: replaced token detection (arXiv:2111.09543, section 3), or its first half."""

    task: Literal["rtd", "mlm"] = "rtd"
    """`rtd` trains a generator and a discriminator; `mlm` a masked language model alone."""
    mask_prob: Annotated[float, Field(gt=0.0, le=0.5)] = 0.15
    """Share of a sequence's tokens that must be predicted."""
    masking_law: Literal["uniform", "windowed"] = "uniform"
    """`uniform` reaches every position; `windowed` is the released code's, bare tail included."""
    mask_token_prob: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Share of the chosen tokens that become [MASK] (BERT: 0.8)."""
    random_token_prob: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the chosen tokens that become a random token (BERT: 0.1); the rest stays."""
    whole_word_masking: bool = False
    """Pieces of a word are chosen together; a word begins at a piece with the space mark, or is a
    lone punctuation mark."""
    max_ngram: Annotated[int, Field(ge=1, le=16)] = 1
    """Words in a row that are chosen together: n up to this, with probability as 1/n."""
    enhanced_mask_decoder: bool = True
    """Absolute positions enter behind the encoder, in two more passes of its last layer."""
    rtd_head: Literal["debertav3", "electra"] = "debertav3"
    """`debertav3`: LayerNorm(h_CLS + h) -> dense -> GELU -> 1; `electra`: dense -> GELU -> 1."""
    rtd_loss_weight: PositiveFloat = 50.0
    """Lambda: weight of the discriminator's loss (50 in the paper, 10 in the released code)."""
    sampling_temperature: PositiveFloat = 1.0
    """Temperature of the generator's draws."""
    draw_special_ids: bool = True
    """Draws may be special ids and ids without a piece, as in the released code."""
    embedding_sharing: Literal["gdes", "es", "nes"] = "gdes"
    """The discriminator's E_D: `gdes` stop_gradient(E_G) + Delta, `es` E_G, `nes` its own."""
    update: Literal["decoupled", "joint"] = "decoupled"
    """`decoupled`: the discriminator's step follows the generator's and sees the updated E_G;
    `joint`: one step for the sum of both losses."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Shares above one, and settings that exclude each other."""
        if self.mask_token_prob + self.random_token_prob > 1.0:
            yield (
                "random_token_prob",
                f"{self.random_token_prob} and mask_token_prob {self.mask_token_prob} are together"
                " more than 1",
            )
        if self.task == "rtd" and self.embedding_sharing == "es" and self.update == "decoupled":
            yield (
                "embedding_sharing",
                '"es" needs objective.update=joint: in decoupled training the gradient of the'
                " discriminator's loss in E_G comes after the generator's step and would be lost",
            )
        if self.max_ngram > 1 and not self.whole_word_masking:
            yield (
                "max_ngram",
                f"{self.max_ngram} counts words: set objective.whole_word_masking=true",
            )
        if self.task == "mlm":
            yield from self._meaningless_for_mlm()

    def _meaningless_for_mlm(self) -> Iterator[tuple[str, str]]:
        """Settings of a discriminator that does not exist."""
        for key in ("rtd_head", "rtd_loss_weight", "sampling_temperature", "draw_special_ids"):
            yield from self._is_default(key, "there is no discriminator and nothing is drawn")
        yield from self._is_default("embedding_sharing", "there is one network and one table")
        yield from self._is_default("update", "there is one network to update")

    def _is_default(self, key: str, reason: str) -> Iterator[tuple[str, str]]:
        value = getattr(self, key)
        if value != type(self).model_fields[key].default:
            yield key, f"{value!r} means nothing with objective.task=mlm: {reason}; leave it out"
