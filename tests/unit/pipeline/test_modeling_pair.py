"""Both networks as one module: embedding sharing, heads, widths, positions, and what is trained."""

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.modeling.pair import NetworkPair, shared_rows
from tests.engines import VOCABULARY, sequence_batch, small_config, small_pair
from tests.reference.small_networks import scramble

DELTA = "deberta.embeddings.word_embeddings._weight"
TABLE = "deberta.embeddings.word_embeddings.weight"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHARINGS = ("gdes", "es", "nes")
BIASED = {"position_biased_input": True}


def objective(sharing="gdes", **changes):
    return ObjectiveSection(embedding_sharing=sharing, update="joint", **changes)


def step(pair, law):
    """Both losses of a micro batch; rows of padded sequences among them."""
    from pipeline.objective_keys import ObjectiveKeys

    batch = sequence_batch(range(4))
    keys = ObjectiveKeys(law, 3, 12, VOCABULARY, "train")
    return pair.predict(batch, keys.mask(batch), keys.draw(batch))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_where_the_discriminator_s_gradient_goes(sharing):
    """gdes: to Delta alone; es: to E_G; nes: to its own table."""
    law = objective(sharing)
    pair = small_pair(law)
    step(pair, law).rtd.loss_sum.backward()
    base = pair.generator.get_parameter(TABLE).grad
    own = {name: p.grad for name, p in pair.discriminator.named_parameters()}
    assert (base is not None and bool(base.any())) is (sharing == "es")
    others = [p.grad for n, p in pair.generator.named_parameters() if n != TABLE]
    assert others == [None] * len(others)
    assert {"gdes": DELTA, "nes": TABLE}.get(sharing) == next(
        (name for name in own if "word_embeddings" in name), None
    )
    assert all(gradient is not None for gradient in own.values())


@pytest.mark.parametrize("biased", [False, True])
def test_gdes_gradient_of_delta_is_that_of_an_untied_table(biased):
    changes = {**NO_DROPOUT, **(BIASED if biased else {})}
    laws = {s: objective(s, enhanced_mask_decoder=not biased) for s in ("gdes", "nes")}
    pairs = {s: small_pair(law, **changes) for s, law in laws.items()}
    pairs["nes"].generator.load_state_dict(pairs["gdes"].generator.state_dict())
    state = pairs["gdes"].discriminator.state_dict()
    tables = [name for name in state if name.endswith("_embeddings._weight")]
    assert len(tables) == (2 if biased else 1)
    for name in tables:
        table = name.replace("_weight", "weight")
        state[table] = state.pop(name) + pairs["gdes"].generator.get_parameter(table).detach()
    pairs["nes"].discriminator.load_state_dict(state)
    outputs = {s: step(pair, laws[s]) for s, pair in pairs.items()}
    left, right = (output.rtd.loss_sum for output in outputs.values())
    torch.testing.assert_close(left, right)
    left.backward()
    right.backward()
    for name in tables:
        torch.testing.assert_close(
            pairs["gdes"].discriminator.get_parameter(name).grad,
            pairs["nes"].discriminator.get_parameter(name.replace("_weight", "weight")).grad,
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("sharing", ["gdes", "es"])
def test_a_biased_discriminator_reads_the_generator_s_positions(sharing):
    law = objective(sharing, enhanced_mask_decoder=False)
    pair = small_pair(law, **NO_DROPOUT, **BIASED)
    ids = sequence_batch(range(2)).input_ids_BL
    embeddings = pair.generator.deberta.embeddings
    expected = embeddings.word_embeddings.weight[ids] + embeddings.position_embeddings.weight[:12]
    rows = shared_rows(pair.generator, pair.discriminator, ids)
    torch.testing.assert_close(rows, expected)
    assert rows.requires_grad is (sharing == "es")
    names = {n for n, _ in pair.discriminator.named_parameters() if "position" in n}
    delta = {"deberta.embeddings.position_embeddings._weight"}
    assert names == (delta if sharing == "gdes" else set())


def test_positions_in_the_input_are_seen():
    law = objective(enhanced_mask_decoder=False)
    pair = small_pair(law, **NO_DROPOUT, **BIASED)
    before = step(pair, law)
    with torch.no_grad():
        pair.generator.deberta.embeddings.position_embeddings.weight[3, 0] += 1.0
    after = step(pair, law)
    assert not torch.equal(before.mlm.loss_sum, after.mlm.loss_sum)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_narrow_tables_are_projected(sharing):
    """ELECTRA's generator is narrow; both networks share a table of another width."""
    law = objective(sharing, enhanced_mask_decoder=False)
    config = small_config(law, embedding_size=8)
    narrow = config.generator.model_copy(update={"hidden_size": 12, "num_attention_heads": 2})
    config = config.model_copy(update={"generator": narrow})
    pair = scramble(NetworkPair(config), 4)
    assert pair.generator.get_parameter(TABLE).shape == (61, 8)
    assert pair.generator.get_parameter("deberta.embeddings.embed_proj.weight").shape == (12, 8)
    assert pair.discriminator.get_parameter("deberta.embeddings.embed_proj.weight").shape == (24, 8)
    assert pair.generator.lm_predictions.lm_head.dense.weight.shape == (8, 12)
    output = step(pair, law)
    (output.mlm.loss_sum + output.rtd.loss_sum).backward()
    assert [name for name, p in pair.named_parameters() if p.grad is None] == []
    names = [n for n, _ in pair.named_parameters() if n.endswith("embed_proj.bias")]
    assert names == [], "as in transformers, the projection has no bias"


def test_the_electra_head_has_neither_a_norm_nor_the_first_state():
    law = objective(rtd_head="electra")
    pair = small_pair(law, **NO_DROPOUT)
    head = pair.discriminator.mask_predictions
    assert {n for n, _ in head.named_parameters()} == {
        "dense.weight",
        "dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    changed = states.clone()
    changed[:, 0] += 1.0
    assert torch.equal(head(states)[:, 1:], head(changed)[:, 1:])
    hand = torch.nn.functional.gelu(head.dense(states)) @ head.classifier.weight[0]
    torch.testing.assert_close(head(states), hand + head.classifier.bias)


def test_without_the_mask_decoder_there_are_no_positions_and_the_last_states_are_scored():
    law = objective(enhanced_mask_decoder=False)
    pair = small_pair(law, **NO_DROPOUT)
    assert pair.generator.deberta.embeddings.position_embeddings is None
    batch = sequence_batch(range(3))
    from pipeline.objective_keys import ObjectiveKeys

    slots = ObjectiveKeys(law, 3, 12, VOCABULARY, "train").mask(batch)
    states = pair.generator.encode(slots.masked_ids_BL, batch.attention_mask())
    rows = states.gather(1, slots.positions_BK[:, :, None].expand(-1, -1, 24))
    head, table = pair.generator.lm_predictions.lm_head, pair.generator.get_parameter(TABLE)
    logits = head.LayerNorm(torch.nn.functional.gelu(head.dense(rows))) @ table.T + head.bias
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), slots.targets_BK.flatten(), reduction="none"
    )
    expected = losses[slots.valid_BK.flatten()].sum()
    torch.testing.assert_close(step_mlm(pair, batch, slots), expected)


def step_mlm(pair, batch, slots):
    arguments = (slots.positions_BK, slots.valid_BK, slots.targets_BK, None, None)
    output = pair.generator(slots.masked_ids_BL, batch.attention_mask(), *arguments)
    assert output.drawn_BK is None
    return output.loss_sum


def test_what_has_an_optimizer():
    assert list(small_pair().trained_modules()) == ["generator", "discriminator"]
    joint = small_pair(objective())
    assert joint.trained_modules() == {"joint": joint}
    alone = small_pair(ObjectiveSection(task="mlm"))
    assert alone.discriminator is None
    assert alone.trained_modules() == {"generator": alone.generator}
    batch = sequence_batch(range(2))
    from pipeline.objective_keys import ObjectiveKeys

    keys = ObjectiveKeys(ObjectiveSection(task="mlm"), 3, 12, VOCABULARY, "train")
    assert keys.draw(batch) is None
    output = alone.predict(batch, keys.mask(batch), None)
    assert output[1:] == (None, None)
    assert output.mlm.loss_sum > 0


@pytest.mark.parametrize("sharing", SHARINGS)
def test_initial_weights_of_every_variant(sharing):
    law = objective(sharing, enhanced_mask_decoder=False)
    config = small_config(law, conv_kernel_size=3, embedding_size=8, **BIASED)
    first, second = NetworkPair(config), NetworkPair(config)
    first.init_weights(7)
    second.init_weights(7)
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right), name
        if name.endswith("encoder.conv.conv.weight"):
            bound = (24 * 3) ** -0.5  # torch's own law, as the release leaves it
            assert left.abs().max() <= bound
            assert left.abs().max() > 0.9 * bound
        elif name.endswith("._weight"):
            assert not left.any()
