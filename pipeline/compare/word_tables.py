"""How alike a network's word embeddings are: the average cosine of arXiv:2111.09543, section 3.3.

Masked language modelling pulls the embeddings of similar words together, replaced token detection
pushes them apart; the average over all pairs shows which force a table has felt.

    E_G     the generator's table
    E_D     what the discriminator reads: E_G, a table of its own, or E_G + Delta
    Delta   of gradient-disentangled sharing

Letters: N rows, E width.
"""

from pathlib import Path

import torch

from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.load import load_pretrained
from pipeline.hf_layout import DELTA, WORD_TABLE, repository_tensors
from pipeline.masking import MaskingVocabulary


def average_cosine(table_NE: torch.Tensor) -> float:
    """Average the cosine over all pairs of different rows, exactly.

    With unit rows u_1 .. u_n, the sum over i != j of u_i . u_j is |u_1 + .. + u_n|^2 - n.

    Args:
        table_NE: [N, E]; rows of zeros have no direction and are left out.

    Returns:
        The average; NaN for fewer than two rows with a direction.
    """
    wide_NE = table_NE.double()
    norms_N = wide_NE.norm(dim=1)
    rows_NE = wide_NE[norms_N > 0] / norms_N[norms_N > 0, None]
    n = len(rows_NE)
    if n < 2:
        return float("nan")
    return float((rows_NE.sum(0).square().sum() - n) / (n * (n - 1)))


def table_cosines(run_folder: Path, dataset: Dataset) -> dict[str, float]:
    """Measure the word tables of a run's newest commit, over the pieces that text is made of.

    Args:
        run_folder: A finished run.
        dataset: Its dataset.

    Returns:
        "E_G" and, where the run has them, "E_D" and "Delta" -> average cosine.

    Raises:
        CorruptError: The commit is damaged.
    """
    pretrained = load_pretrained(run_folder)
    tensors = repository_tensors(pretrained.pair, pretrained.config, "fp32")
    tables = {"E_G": tensors["generator"][WORD_TABLE]}
    discriminator = pretrained.pair.discriminator
    if discriminator is not None:
        tables["E_D"] = tensors["discriminator"][WORD_TABLE]
        own = dict(discriminator.named_parameters())
        if DELTA in own:
            tables["Delta"] = own[DELTA].detach()
    tokenizer = Tokenizer.load(dataset.tokenizer_folder)
    pieces = MaskingVocabulary.from_tokenizer(tokenizer).text_ids
    return {
        name: average_cosine(table[pieces.start : pieces.stop]) for name, table in tables.items()
    }
