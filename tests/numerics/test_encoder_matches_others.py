"""Hidden states of DeBERTaV3 against transformers and against the authors' encoder."""

import pytest
import torch

from pipeline.modeling.embeddings import LayerNorm
from tests.reference import released_encoder, transformers_encoder
from tests.reference.plain_encoder import bucket
from tests.reference.small_networks import (
    VOCABULARY,
    batch,
    discriminator,
    generator,
    model_section,
    network_section,
)

FP32_TOLERANCE = 1e-5  # three layers of fp32 rounding at activations of about 1
FP64_TOLERANCE = 1e-10


def merged_encoder_weights(discriminator_network, generator_network):
    """The discriminator's backbone as an export would write it: one table, E_G + Delta."""
    weights = discriminator_network.deberta.state_dict()
    delta = weights.pop("embeddings.word_embeddings._weight")
    base = generator_network.deberta.embeddings.word_embeddings.weight.detach()
    return {**weights, "embeddings.word_embeddings.weight": base + delta}


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, FP32_TOLERANCE), (torch.float64, FP64_TOLERANCE)]
)
def test_discriminator_equals_transformers(backend, dtype, atol):
    data, base = batch(), generator(dtype)
    ours = discriminator(dtype, model=model_section(attention_backend=backend))
    weights = merged_encoder_weights(ours, base)
    theirs = transformers_encoder.model(network_section(), VOCABULARY, dtype, weights)
    with torch.no_grad():
        rows = base.token_embeddings(data.ids, with_positions=False)
        hidden = ours.encode(data.ids, rows, data.mask)
        expected = theirs(data.ids, attention_mask=data.mask).last_hidden_state
    torch.testing.assert_close(hidden[data.mask], expected[data.mask], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, FP32_TOLERANCE), (torch.float64, FP64_TOLERANCE)]
)
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (32, {}),
        (512, {"position_buckets": 256, "max_position_embeddings": 512, "hidden_size": 12}),
    ],
)
def test_generator_equals_transformers(length, sizes, dtype, atol):
    data, ours = batch(length), generator(dtype, layers=2, **sizes)
    weights = ours.deberta.state_dict()
    del weights["embeddings.position_embeddings.weight"]
    theirs = transformers_encoder.model(network_section(2, **sizes), VOCABULARY, dtype, weights)
    with torch.no_grad():
        hidden = ours.encode(data.ids, data.mask)
        expected = theirs(data.ids, attention_mask=data.mask).last_hidden_state
    torch.testing.assert_close(hidden[data.mask], expected[data.mask], rtol=0, atol=atol)


@pytest.fixture
def released():
    with released_encoder.loaded() as module:
        yield module


def released_modules(released, ours, network):
    """The authors' embeddings and encoder with our generator's weights, every key matched."""
    settings = released_encoder.config(network, VOCABULARY)
    embeddings, encoder = released.BertEmbeddings(settings), released.BertEncoder(settings)
    weights = ours.deberta.embeddings.state_dict()
    del weights["position_embeddings.weight"]
    embeddings.load_state_dict(weights)
    encoder.load_state_dict(ours.deberta.encoder.state_dict())
    return embeddings.eval(), encoder.eval()


@pytest.mark.parametrize("length", [20, 60])
def test_generator_equals_the_authors_encoder(released, length):
    data, ours = batch(length), generator()
    # 60 tokens, distances clamped at 31. This version of the package does not clamp by itself (nor
    # does transformers, which reads a row that is never trained), so it is given the positions.
    clamped = [[bucket(i - j, 8, 32) for j in range(length)] for i in range(length)]
    embeddings, encoder = released_modules(released, ours, network_section())
    with torch.no_grad():
        hidden = ours.encode(data.ids, data.mask)
        embedded = embeddings(data.ids, mask=data.mask.long())
        ours_embedded = ours.deberta.embeddings(data.ids, data.mask, None)
        torch.testing.assert_close(ours_embedded, embedded, rtol=0, atol=FP32_TOLERANCE)
        expected = encoder(embedded, data.mask.long(), relative_pos=torch.tensor([clamped]))[-1]
    torch.testing.assert_close(hidden[data.mask], expected[data.mask], rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3, "conv_act": "gelu"}])
def test_decoder_equals_the_authors_layers_applied_twice(released, changes):
    data, ours = batch(), generator(**changes)
    embeddings, encoder = released_modules(released, ours, network_section(**changes))
    slots = ours.deberta.embeddings.position_embeddings(data.positions)
    with torch.no_grad():
        embedded = ours.deberta.embeddings(data.ids, data.mask, None)
        decoded = ours.deberta.encoder.decode(embedded, data.mask, None, data.positions, slots)
        memory = encoder(embeddings(data.ids, mask=data.mask.long()), data.mask.long())[-2]
        query = memory + ours.deberta.embeddings.position_embeddings.weight[: memory.shape[1]]
        pairs = encoder.get_attention_mask(data.mask.long())
        table = encoder.get_rel_embedding()
        for _ in range(2):
            query = encoder.layer[-1](memory, pairs, query_states=query, rel_embeddings=table)
    rows = torch.arange(3)[:, None]
    expected = query[rows, data.positions][data.valid]
    torch.testing.assert_close(decoded[data.valid], expected, rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3}])
@pytest.mark.parametrize("extra", [0, 6])
def test_padding_changes_nothing_at_real_tokens(extra, changes):
    data, ours = batch(length=20), generator(torch.float64, **changes)
    short = ours.encode(data.ids[1:2, :13], None)
    ids = torch.full((1, 13 + extra), 17)
    ids[:, :13] = data.ids[1, :13]
    mask = torch.arange(13 + extra)[None] < 13
    for filler in (0, 17):
        ids[:, 13:] = filler
        padded = ours.encode(ids, mask)[:, :13]
        torch.testing.assert_close(padded, short, rtol=0, atol=1e-12)


def test_layer_norm_takes_wider_inputs_than_its_weights():
    norm = LayerNorm(8, 1e-7)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 8)
    expected = norm(x)
    norm.bfloat16()
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), expected, rtol=0.02, atol=0.02)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm(x.double()).dtype == torch.float64
