"""The authors' own encoder, PyPI `deberta` 0.1.12, made importable on today's Python."""

import collections
import collections.abc
import contextlib
import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest


@contextlib.contextmanager
def loaded():
    """Import its `bert` module (embeddings, layers, encoder) for the time of a test.

    The package expects names that Python 3.10 and NumPy 1.24 removed, and `requests`, which only
    its downloads use; its arithmetic is untouched.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collections, "Sequence", collections.abc.Sequence, raising=False)
        patch.setattr(np, "int", int, raising=False)
        if importlib.util.find_spec("requests") is None:
            patch.setitem(sys.modules, "requests", types.ModuleType("requests"))
        yield importlib.import_module("DeBERTa.deberta.bert")


def config(network, vocab_size):
    """Describe one of our networks in its terms; it has the position rule of transformers."""
    relative = network.relative_attention
    module = importlib.import_module("DeBERTa.deberta.config")
    return module.ModelConfig.from_dict(
        {
            **network.model_dump(exclude={"relative_position_rule"}),
            "embedding_size": network.word_embedding_size,
            "vocab_size": vocab_size,
            "hidden_act": "gelu",
            "pos_att_type": "p2c|c2p" if relative else "",
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm" if relative else "none",
            "type_vocab_size": 0,
            "padding_idx": 0,
            "attention_head_size": network.attention_head_size,
        }
    )
