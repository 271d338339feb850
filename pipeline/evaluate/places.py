"""Places in texts: the tokens of some characters, and the windows of a long text."""

import numpy as np

from pipeline.evaluate.examples import Range


def tokens_of(offsets: np.ndarray, characters: Range) -> tuple[int, int]:
    """Find the tokens of some characters.

    Args:
        offsets: int32 [n, 2], characters of each token.
        characters: [start, end) in the text.

    Returns:
        Tokens [start, end); (0, 0) where there are none.
    """
    begin, end = characters
    inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


def windows(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Divide a long text into windows that overlap.

    Args:
        num_tokens: Of the text.
        room: Tokens of a window.
        stride: Tokens that neighbours share; at most half of a window.

    Returns:
        Tokens [start, end) of each window, at least one.
    """
    step = room - min(stride, room // 2)
    found = [(0, min(room, num_tokens))]
    while found[-1][1] < num_tokens:
        first = found[-1][0] + step
        found.append((first, min(first + room, num_tokens)))
    return found
