"""Many small things at a time, in bounded memory: `in_batches`."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def in_batches(
    items: Iterable[Item], size_of: Callable[[Item], int], batch_size: int
) -> Iterator[list[Item]]:
    """Divide a stream into batches.

    Args:
        items: The stream.
        size_of: How much an item counts for; what an item costs however small it is belongs to it.
        batch_size: Size from which a batch takes no further item; the last one may be large.

    Yields:
        The items in order, in lists of one or more.
    """
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
