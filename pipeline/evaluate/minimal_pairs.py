"""A zero-shot probe: does a network find the better sentence of two that differ in one point?

    {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "agreement"}

    read_minimal_pairs       a .jsonl file, as that of BLiMP -> token ids
    within_budget            as many of them as a share of the training's operations allows
    minimal_pair_scores      both networks -> scores of all sentences
    evaluate_minimal_pairs   the same -> shares of pairs whose good sentence scores higher

The generator's score is the pseudo-log-likelihood (Salazar et al., arXiv:1910.14659): each token is
masked once, and the logarithms of its probabilities are added up. The discriminator's is the sum of
log P(original) over the tokens of the sentence as it stands. Nothing is trained. Both come from one
forward pass for each sentence: a row for each masked token, and one without a mask.

Letters: B rows, L tokens with [CLS] and [SEP].
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.masking import MaskedBatch
from pipeline.modeling.pair import PairOutput
from pipeline.rtd import DrawKey
from pipeline.runtime import World
from pipeline.sequences import SequenceBatch

NETWORKS = ("generator", "discriminator")
FIELDS = ("sentence_good", "sentence_bad")
GROUP_FIELDS = ("field", "linguistics_term", "UID")
"""What pairs are about, from wide to narrow, as BLiMP's files say it."""
_MIN_SPECIAL = 2  # [CLS] and [SEP]
_SHUFFLE_SEED = 0

Predict = Callable[[SequenceBatch, MaskedBatch, DrawKey | None], PairOutput]
DrawKeys = Callable[[SequenceBatch], DrawKey | None]


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences as ids, [CLS] and [SEP] included."""

    good: tuple[int, ...]
    bad: tuple[int, ...]
    group: str
    """What they differ in; empty where the file does not say."""
    labels: tuple[tuple[str, str], ...] = ()
    """Columns of `GROUP_FIELDS` with their values, where the file has them."""

    @property
    def forward_tokens(self) -> int:
        """Tokens of all rows that are computed for it."""
        lengths = (len(self.good), len(self.bad))
        return sum((length - _MIN_SPECIAL + 1) * length for length in lengths)


@dataclass(frozen=True)
class MinimalPairs:
    """The pairs of a file."""

    pairs: tuple[MinimalPair, ...]
    mask_id: int
    num_left_out: int
    """Pairs with a sentence that is longer than the model's or empty, or with equal ids."""


def read_minimal_pairs(path: Path, tokenizer: Tokenizer, max_tokens: int) -> MinimalPairs:
    """Read and tokenize a file of pairs.

    Args:
        path: A .jsonl file: `sentence_good`, `sentence_bad`, and `UID` where pairs have groups.
        tokenizer: The model's.
        max_tokens: Longest sentence in tokens, [CLS] and [SEP] included.

    Returns:
        The pairs, in an order that mixes the groups and is always the same.

    Raises:
        UserError: The file cannot be read, a line is no pair, or no pair is left.
    """
    records = list(_records(path))
    texts = [record[field] for record in records for field in FIELDS]
    ids = [
        (tokenizer.cls_id, *pieces, tokenizer.sep_id) for pieces in tokenizer.encode_batch(texts)
    ]
    every = [
        MinimalPair(good, bad, str(record.get("UID", "")), _labels(record))
        for record, good, bad in zip(records, ids[::2], ids[1::2], strict=True)
    ]
    kept = [
        pair
        for pair in every
        if pair.good != pair.bad
        and all(_MIN_SPECIAL < len(one) <= max_tokens for one in (pair.good, pair.bad))
    ]
    if not kept:
        raise UserError(
            f"{path}: none of its {len(every)} pairs can be used: their sentences are equal in "
            f"this vocabulary, empty, or longer than {max_tokens} tokens; choose another file"
        )
    # The first ones stand for all, as files are sorted by group.
    random.Random(_SHUFFLE_SEED).shuffle(kept)
    return MinimalPairs(tuple(kept), tokenizer.mask_id, len(every) - len(kept))


def _labels(record: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Take what a pair is about."""
    return tuple((name, str(record[name])) for name in GROUP_FIELDS if record.get(name))


def _records(path: Path) -> Iterator[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        for field in FIELDS:
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(
                    f"{path}, line {number}: needs the texts {' and '.join(FIELDS)} in one object"
                )
        yield record


def within_budget(pairs: MinimalPairs, forward_tokens: float) -> tuple[MinimalPair, ...]:
    """Choose as many pairs as may be computed, always the same.

    Args:
        pairs: All pairs.
        forward_tokens: Tokens of rows that may go through both networks.

    Returns:
        The first pairs that fit together; none where the first one does not.
    """
    chosen, spent = [], 0
    for pair in pairs.pairs:
        spent += pair.forward_tokens
        if spent > forward_tokens:
            break
        chosen.append(pair)
    return tuple(chosen)


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a sentence: what one forward pass computes."""

    pair: int
    is_good: bool
    ids: tuple[int, ...]
    rows: range
    """Positions that are masked, one a row; that of [SEP] stands for the row without a mask."""


def evaluate_minimal_pairs(
    predict: Predict,
    pairs: Sequence[MinimalPair],
    *,
    mask_id: int,
    draw: DrawKeys,
    max_forward_tokens: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Count the pairs that each network gets right; a collective.

    Args:
        predict: Computes both networks, in evaluation mode.
        pairs: The same on all ranks, at least one.
        mask_id: Id of [MASK].
        draw: Names the noise of a batch's draws, which count for nothing here.
        max_forward_tokens: Tokens of one forward pass at most, but at least one row.
        world: This process's place.
        should_stop: Asked before every forward pass, with the same answer on all ranks.

    Returns:
        "eval/minimal_pairs_NETWORK" -> share of the pairs whose good sentence scores higher (equal
        scores count half), and behind "/GROUP" that of each group; of the discriminator where there
        is one. None where it was stopped.
    """
    options = (mask_id, draw, max_forward_tokens, world, should_stop)
    scores = minimal_pair_scores(predict, pairs, *options)
    if scores is None:
        return None
    figures: dict[str, float] = {}
    groups = sorted({pair.group for pair in pairs} - {""})
    for network, (bad_P, good_P) in scores.items():
        right_P = right_shares(bad_P, good_P)
        name = f"eval/minimal_pairs_{network}"
        figures[name] = float(right_P.mean())
        for group in groups:
            inside_P = torch.tensor([pair.group == group for pair in pairs])
            figures[f"{name}/{group}"] = float(right_P[inside_P].mean())
    return figures


def right_shares(bad_P: torch.Tensor, good_P: torch.Tensor) -> torch.Tensor:
    """Compare the scores of both sentences.

    Args:
        bad_P: Scores of the bad sentences.
        good_P: Scores of the good ones.

    Returns:
        fp64 [pairs]: 1 where the good sentence scores higher, 1/2 where both score the same.
    """
    return (good_P > bad_P).double() + (good_P == bad_P).double() / 2


@torch.no_grad()
def minimal_pair_scores(
    predict: Predict,
    pairs: Sequence[MinimalPair],
    mask_id: int,
    draw: DrawKeys,
    max_forward_tokens: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Score both sentences of every pair; a collective.

    Args:
        predict: As for `evaluate_minimal_pairs`.
        pairs: Likewise.
        mask_id: Likewise.
        draw: Likewise.
        max_forward_tokens: Likewise.
        world: Likewise.
        should_stop: Likewise.

    Returns:
        Network -> scores of the bad and of the good sentences in nats, fp64 [pairs] each, on the
        host; None where it was stopped.
    """
    of_ranks = [
        list(_chunks(pairs, range(rank, len(pairs), world.world_size), max_forward_tokens))
        for rank in range(world.world_size)
    ]
    mine = of_ranks[world.rank]
    scores_N2P = torch.zeros(len(NETWORKS), 2, len(pairs), dtype=torch.float64, device=world.device)
    networks = NETWORKS
    # All ranks take part in every forward pass, because a sharded model is gathered there.
    for number in range(max(map(len, of_ranks))):
        if should_stop():
            return None
        is_mine = number < len(mine)
        chunk = mine[number] if is_mine else _any_chunk(pairs)
        batch, slots, is_plain_B = _rows(chunk, mask_id, world.device)
        mlm, rtd, _ = predict(batch, slots, draw(batch))
        networks = NETWORKS if rtd is not None else NETWORKS[:1]
        if is_mine:
            scores_N2P[0, int(chunk.is_good), chunk.pair] -= mlm.loss_sum.double()
            if rtd is not None:
                originals_BL = F.logsigmoid(-rtd.logits_BL.double())
                sentence = originals_BL[is_plain_B, 1:-1].sum()
                scores_N2P[1, int(chunk.is_good), chunk.pair] += sentence
    if dist.is_initialized() and world.world_size > 1:
        dist.all_reduce(scores_N2P)
    return {
        name: (bad_P, good_P)
        for name, (bad_P, good_P) in zip(networks, scores_N2P.cpu(), strict=False)
    }


def _chunks(pairs: Sequence[MinimalPair], own: range, max_forward_tokens: int) -> Iterator[_Chunk]:
    """Cut the sentences of some pairs into forward passes."""
    for index in own:
        for is_good, ids in ((True, pairs[index].good), (False, pairs[index].bad)):
            num_rows = len(ids) - _MIN_SPECIAL + 1
            size = max(1, max_forward_tokens // len(ids))
            for first in range(0, num_rows, size):
                rows = range(1 + first, 1 + min(first + size, num_rows))
                yield _Chunk(index, is_good, ids, rows)


def _any_chunk(pairs: Sequence[MinimalPair]) -> _Chunk:
    """What a rank computes that has nothing left."""
    return _Chunk(0, True, pairs[0].good, range(1, 2))


def _rows(
    chunk: _Chunk, mask_id: int, device: torch.device
) -> tuple[SequenceBatch, MaskedBatch, torch.Tensor]:
    """Build the rows of a forward pass."""
    count, length = len(chunk.rows), len(chunk.ids)
    ids_BL = torch.tensor(chunk.ids, device=device).repeat(count, 1)
    positions_B1 = torch.tensor(chunk.rows, device=device)[:, None]
    is_plain_B1 = positions_B1 == length - 1
    # A slot that does not count is at position 0, as in `choose_masks`.
    positions_B1 = torch.where(is_plain_B1, 0, positions_B1)
    masked_BL = ids_BL.scatter(1, positions_B1, mask_id)
    masked_BL = torch.where(is_plain_B1, ids_BL, masked_BL)
    words_B2 = torch.zeros(count, 2, dtype=torch.int64, device=device)
    lengths_B = torch.full((count,), length, device=device)
    batch = SequenceBatch(ids_BL, lengths_B, words_B2, True)
    targets_B1 = ids_BL.gather(1, positions_B1)
    return batch, MaskedBatch(masked_BL, positions_B1, ~is_plain_B1, targets_B1), is_plain_B1[:, 0]
