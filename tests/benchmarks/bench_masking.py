"""Masking batches of 64 sequences of 512 tokens, 15 % of them, all chosen tokens as [MASK].

uniform            ours: exactly 77 of 510, as a batch on the host is masked
windowed           ours: the released code's law, one token in every window of 6
uniform, tensors   ours as a GPU evaluates it, with shapes that do not depend on the data; here on
                   the CPU, where nobody uses it: the same integers
collator           transformers' DataCollatorForLanguageModeling on rows as `datasets` gives them,
                   lists with their special_tokens_mask, to torch; a Bernoulli law
collator, numpy    the same to NumPy
collator's draws   only its masking of a batch that is a tensor already
original           the masking of microsoft/DeBERTa (mlm_task.py: `NGramMaskGenerator` and
                   `example_to_feature`), which is not on PyPI: re-derived, with the same loops

The original's law is the windowed one, the collator's is near the uniform one. In every case a
batch is let go before the next one is masked, as training does.
"""

import math
import random
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import sample_words
from pipeline.masking import (
    MaskedBatch,
    MaskingVocabulary,
    MaskKeys,
    choose_masks,
    choose_on_device,
)
from pipeline.sequences import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, exhaust, main, measure, require

LENGTH, SEQUENCES, BATCHES = 512, 64, 24
PIECES = 128_000
MASK_ID = PIECES
SPECIAL = {"[PAD]": PAD_ID, "[CLS]": CLS_ID, "[SEP]": SEP_ID, "[UNK]": UNK_ID, "[MASK]": MASK_ID}
SHARE = 0.15
ROUNDS = 7


def vocabulary() -> dict[str, int]:
    """Names of 128,001 pieces."""
    names = {f"piece{number}": number for number in range(len(SPECIAL) - 1, PIECES)}
    return SPECIAL | names


def batches() -> list[torch.Tensor]:
    """Sequences of random pieces, int64 [64, 512] each."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(4, PIECES, (BATCHES, SEQUENCES, LENGTH), generator=generator)
    found[:, :, 0], found[:, :, -1] = CLS_ID, SEP_ID
    return list(found)


class Ours:
    """Our masking of one batch after another, each with samples of its own."""

    def __init__(self, law: str, choose: Any = choose_masks) -> None:
        self._objective = ObjectiveSection.model_validate({"masking_law": law, "mask_prob": SHARE})
        self._choose = choose
        self._keys = MaskKeys.derive(1, "train", LENGTH)
        self._vocabulary = MaskingVocabulary(MASK_ID)
        self._lengths = torch.full((SEQUENCES,), LENGTH)
        samples = range(BATCHES * SEQUENCES)
        words = torch.tensor([sample_words(0, sample) for sample in samples])
        self._words = words.split(SEQUENCES)  # a batch comes with them

    def __call__(self, ids: list[torch.Tensor]) -> Iterator[MaskedBatch]:
        rest = (self._objective, self._keys, self._vocabulary)
        for ids_BL, words_B2 in zip(ids, self._words, strict=True):
            yield self._choose(ids_BL, self._lengths, words_B2, *rest)


class Original:
    """The released masking of one sequence, a list of names of pieces, and its four features."""

    def __init__(self, ids_of: dict[str, int], max_ngram: int = 1) -> None:
        self._ids_of = ids_of
        self._most = math.ceil(LENGTH * SHARE / 10) * 10
        self._window = int(1 / SHARE)
        self._sizes = np.arange(1, max_ngram + 1)

    def __call__(self, tokens: list[str], rng: random.Random) -> dict[str, torch.Tensor]:
        special = ["[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"]
        words = [[place] for place, token in enumerate(tokens) if token not in special]
        quota = min(self._most, max(1, round(len(tokens) * SHARE)))
        is_chosen = np.zeros(len(words), bool)
        weights, offset = 1 / self._sizes / (1 / self._sizes).sum(), 0
        while offset < len(words):
            bounds = np.cumsum(weights)
            size = self._sizes[bisect(bounds, rng.random() * bounds[-1])]
            context = min(size * self._window, len(words) - offset)
            first = offset + rng.randint(0, context - 1)
            end = min(first + size, len(words))
            offset = max(offset + context, end)
            is_chosen[first:end] = True
        labels: list[str | None] = [None] * len(tokens)
        count = 0
        for chosen, word in zip(is_chosen, words, strict=True):
            if chosen:
                for place in word:
                    labels[place] = tokens[place]
                    # All of them are masked in RTD; the draw that decides it is made all the same.
                    tokens[place] = "[MASK]" if rng.random() < 1 else tokens[place]
                    count += 1
                if count >= quota:
                    break
        features = {
            "input_ids": [self._ids_of[token] for token in tokens],
            "position_ids": list(range(len(tokens))),
            "input_mask": [1] * len(tokens),
            "labels": [self._ids_of[label] if label else 0 for label in labels],
        }
        return {name: torch.tensor(each, dtype=torch.int) for name, each in features.items()}


def collators(ids_of: dict[str, int]) -> dict[str, Any]:
    """The collator with a fast tokenizer of our vocabulary, to torch and to NumPy."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids_of, unk_token="[UNK]")),
        **{f"{name.strip('[]').lower()}_token": name for name in SPECIAL},
    )
    return {
        kind: DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=SHARE,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            return_tensors=kind,
        )
        for kind in ("pt", "np")
    }


def masked_share(ids: torch.Tensor | np.ndarray) -> float:
    """Share of [MASK] in masked ids."""
    return float((ids == MASK_ID).sum()) / math.prod(ids.shape)


def benchmark(_device: str) -> Outcome:
    require("tokenizers", "transformers")
    ids_of, ids = vocabulary(), batches()
    by_kind, original = collators(ids_of), Original(ids_of)
    special = [0] * LENGTH
    special[0] = special[-1] = 1
    rows = [
        [{"input_ids": row, "special_tokens_mask": special} for row in batch.tolist()]
        for batch in ids
    ]
    names = sorted(ids_of, key=ids_of.__getitem__)
    texts = [[[names[each] for each in row] for row in batch.tolist()] for batch in ids]
    special_BL = torch.tensor(special).expand(SEQUENCES, -1)
    uniform, windowed = Ours("uniform"), Ours("windowed")
    tensors = Ours("uniform", choose_on_device)

    def originals() -> Iterator[torch.Tensor]:
        for number, batch in enumerate(texts):
            starts = accumulate([number * SEQUENCES] + [1] * (SEQUENCES - 1))
            features = [
                original(list(tokens), random.Random(seed))
                for tokens, seed in zip(batch, starts, strict=True)
            ]
            yield torch.stack([each["input_ids"] for each in features])

    def draws(batch: torch.Tensor) -> Any:
        return by_kind["pt"].torch_mask_tokens(batch.clone(), special_tokens_mask=special_BL)

    cases = [
        Case("uniform", lambda: exhaust(uniform(ids))),
        Case("windowed", lambda: exhaust(windowed(ids))),
        Case("uniform, tensors", lambda: exhaust(tensors(ids))),
        Case("collator", lambda: exhaust(map(by_kind["pt"], rows))),
        Case("collator, numpy", lambda: exhaust(map(by_kind["np"], rows))),
        Case("collator's draws", lambda: exhaust(map(draws, ids))),
        Case("original", lambda: exhaust(originals())),
    ]
    for plain, other in zip(uniform(ids), tensors(ids), strict=True):
        assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))
    shares = {
        "uniform": masked_share(next(uniform(ids)).masked_ids_BL),
        "windowed": masked_share(next(windowed(ids)).masked_ids_BL),
        "collator": masked_share(by_kind["pt"](rows[0])["input_ids"]),
        "collator, numpy": masked_share(by_kind["np"](rows[0])["input_ids"]),
        "original": masked_share(next(originals())),
    }
    seconds, notes = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="masking",
        unit="tokens",
        work=BATCHES * SEQUENCES * LENGTH,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[
            ("uniform", "collator"),
            ("uniform", "collator, numpy"),
            ("uniform", "collator's draws"),
            ("uniform", "uniform, tensors"),
            ("windowed", "original"),
            ("uniform", "original"),
        ],
        shape={"length": LENGTH, "sequences": SEQUENCES, "batches": BATCHES},
        facts={f"% masked, {name}": 100 * share for name, share in shares.items()},
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
