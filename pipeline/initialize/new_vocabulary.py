"""Word tables under another tokenizer: whether rows still mean what they meant, and which move.

A row belongs to a piece, and the same id is another piece in another tokenizer. Continuing with
another vocabulary is therefore refused unless `initialize.new_vocabulary=resize` asks for it: then
pieces that both tokenizers spell alike keep their rows, as do [MASK] and the ids without a piece.

Letters: V rows of the new table, E its width.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.config import RunConfig
from pipeline.hf_layout import DELTA, WORD_TABLE, Tensors
from pipeline.initialize.donors import Source
from pipeline.initialize.released_layout import MLM_BIAS

_OF_VOCABULARY = (WORD_TABLE, DELTA, MLM_BIAS)


@dataclass(frozen=True)
class RowTransfer:
    """Where each row of a new word table comes from."""

    old_row_V: torch.Tensor
    """int64 [V]: row of the old table, -1 for a row that it does not have."""
    num_old_pieces: int
    """The first rows of the old table, over which the mean is taken."""

    def apply(self, weights: Tensors) -> Tensors:
        """Move the rows of everything that has one for each id.

        New rows are the mean of the old pieces' rows. Their logits are then the mean logit, which
        takes no probability from pieces that the model knows; rows drawn at random may have any.
        The mean is linear: tables and their Delta still agree.

        Args:
            weights: Of a donor, by our names.

        Returns:
            The same, with word table, Delta and output bias of V rows.
        """
        return {
            key: self._moved(tensor) if key in _OF_VOCABULARY else tensor
            for key, tensor in weights.items()
        }

    def _moved(self, old: torch.Tensor) -> torch.Tensor:
        new = old[self.old_row_V.clamp(min=0)]
        mean = old[: self.num_old_pieces].double().mean(0)
        new[self.old_row_V < 0] = mean.to(old.dtype)
        return new


def match_pieces(old: Tokenizer, new: Tokenizer, num_old_rows: int, num_rows: int) -> RowTransfer:
    """Find the old row of every new id, by the spelling of its piece.

    Args:
        old: The tokenizer that the model learned with.
        new: The dataset's.
        num_old_rows: Rows of the old table; pieces, [MASK], ids without a piece.
        num_rows: Rows of the new one, V.

    Returns:
        The transfer.
    """
    row_of = {name: row for row, name in enumerate(_names(old, num_old_rows))}
    rows = [row_of.get(name, -1) for name in _names(new, num_rows)]
    return RowTransfer(torch.tensor(rows), old.num_pieces)


def _names(tokenizer: Tokenizer, num_rows: int) -> list[tuple[str, str | int]]:
    """Name every id so that no piece can be taken for [MASK] or for an id without a piece."""
    pieces = [("piece", piece) for piece in tokenizer.pieces(range(tokenizer.num_pieces))]
    others = [("behind the pieces", n) for n in range(num_rows - tokenizer.num_pieces)]
    return [*pieces, *others]


def transfer_rows(
    source: Source, config: RunConfig, tokenizer: Tokenizer
) -> tuple[RowTransfer | None, list[str]]:
    """Compare the vocabularies and decide what becomes of the rows.

    Args:
        source: What the run continues; donors with equally long tables.
        config: The run.
        tokenizer: The dataset's.

    Returns:
        The transfer, None where every row stays; and notes.

    Raises:
        UserError: The vocabularies differ, and nobody asked for that; or they cannot be compared.
    """
    num_old_rows = next(donor.num_rows for donor in source.donors.values() if donor.num_rows)
    num_rows = config.model.vocab_size
    known = source.tokenizer_fingerprint
    if known is None:
        if num_old_rows == num_rows:
            return None, [
                f"{source.path} has no spm.model: that its ids mean what the dataset's mean is "
                "assumed, not checked"
            ]
        raise UserError(
            f"initialize.path {source.path} has a vocabulary of {num_old_rows}, model.vocab_size "
            f"is {num_rows}, and without an spm.model beside the weights nothing tells which row "
            "is which piece: put the model's spm.model there"
        )
    if known == tokenizer.fingerprint and num_old_rows == num_rows:
        return None, []
    if config.initialize.new_vocabulary == "refuse":
        raise UserError(_refusal(source, config, tokenizer, num_old_rows))
    old = _old_tokenizer(source, num_old_rows)
    transfer = match_pieces(old, tokenizer, num_old_rows, num_rows)
    return transfer, [_summary(transfer, old, tokenizer)]


def _refusal(source: Source, config: RunConfig, tokenizer: Tokenizer, num_old_rows: int) -> str:
    known = source.tokenizer_fingerprint or ""
    what = (
        f"initialize.path {source.path} learned with another tokenizer (spm.model {known[:12]}) "
        f"than data.path {config.data.path} was made with ({tokenizer.fingerprint[:12]})"
    )
    cure = f"build the dataset with `deberta-prep build --tokenizer {source.tokenizer_path}`"
    if known == tokenizer.fingerprint:
        what = (
            f"initialize.path {source.path} has a table of {num_old_rows} rows, model.vocab_size "
            f"is {config.model.vocab_size}, for the same tokenizer"
        )
        cure = "check that the weights are the model's"
    return (
        f"{what}: {cure}, or set initialize.new_vocabulary=resize, which keeps the rows of the "
        "pieces that both know"
    )


def _old_tokenizer(source: Source, num_old_rows: int) -> Tokenizer:
    """Load the tokenizer that the model learned with."""
    assert source.tokenizer_path is not None, "a fingerprint without a place"
    try:
        old = Tokenizer.load(source.tokenizer_path)
    except UserError as error:
        raise UserError(
            f"initialize.new_vocabulary=resize needs the tokenizer that {source.path} learned "
            f"with: {error}"
        ) from error
    if old.fingerprint != source.tokenizer_fingerprint:
        raise UserError(
            f"initialize.new_vocabulary=resize needs the tokenizer that {source.path} learned "
            f"with, and {source.tokenizer_path} is another one by now: give an export of the model"
        )
    if num_old_rows <= old.mask_id:
        raise UserError(
            f"{source.path}: the word table has {num_old_rows} rows, spm.model {old.num_pieces} "
            "pieces and [MASK]: they do not belong together"
        )
    return old


def _summary(transfer: RowTransfer, old: Tokenizer, new: Tokenizer) -> str:
    is_known_V = transfer.old_row_V >= 0
    pieces = int(is_known_V[: new.num_pieces].sum())
    kept = Counter(is_known_V.tolist())
    return (
        f"new vocabulary: {pieces:,} of {new.num_pieces:,} pieces are known to the old tokenizer "
        f"and keep their rows, {old.num_pieces - pieces:,} of its pieces are gone; {kept[False]:,} "
        f"of {len(is_known_V):,} rows are new and start as the mean of the old pieces' rows, in "
        "every word table and in the head's bias"
    )
