"""Shards in, a pre-trained DeBERTaV3 out."""

__version__ = "0.1.0"
