"""transformers' DebertaV2Model, described by our sections: an independent encoder of today."""

from transformers import DebertaV2Config, DebertaV2Model


def transformers_config(network, vocab_size, **changes):
    """Describe one of our sections as transformers does."""
    relative = network.relative_attention
    fields = {
        **network.model_dump(exclude={"relative_position_rule"}),
        "embedding_size": network.word_embedding_size,
        "vocab_size": vocab_size,
        # It counts the terms of the scale here, even without relative attention.
        "pos_att_type": "p2c|c2p" if relative else "",
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm" if relative else "none",
        "type_vocab_size": 0,
    }
    return DebertaV2Config(**{**fields, **changes})


def model(network, vocab_size, dtype, weights=None):
    """Build one of our networks, with given weights of the whole model where there are any."""
    built = DebertaV2Model(transformers_config(network, vocab_size)).to(dtype).eval()
    if weights is not None:
        built.load_state_dict(weights)
    return built
