"""Which split a document belongs to: a function of its text, or of the text that it resembles.

`split_digest` makes 64 bits of a text, `split_of` a split of those. Deduplication gives a document
the digest of the first one of its cluster, so that near-duplicates share a split as copies do.
"""

import hashlib

from data_prep.manifest import Split


def split_digest(text: bytes) -> int:
    """What decides the split of a document.

    Args:
        text: the cleaned text as UTF-8.

    Returns:
        The first 8 bytes of BLAKE2b (digest size 8), big endian.
    """
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def split_of(digest: int, heldout_fraction: float) -> Split:
    """The split of a document, so that copies, which share a digest, share it.

    Args:
        digest: of `split_digest`.
        heldout_fraction: share of the documents that is held out.

    Returns:
        `heldout` if the digest, as a fraction of 2^64, lies below it.
    """
    return "heldout" if digest < heldout_fraction * 2.0**64 else "train"
