"""Traps 21 to 32 of debertav3-facts.md, section 9: schedules, worlds, export, data, precision.

One named test each, in their order. The worlds of several processes that traps 22, 24, 25 and 26
need are started once (`worlds`) and judged by the plain reference on the same data.
"""

import math

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from data_prep.hf_tokenizer import compare_tokenizers
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.config import ObjectiveSection, ScheduleSection
from pipeline.export import export_run, find_commit
from pipeline.initialize.pair import initialize_pair
from pipeline.modeling.attention import KeySide, disentangled_attention
from pipeline.modeling.pair import shared_rows
from pipeline.modeling.relative_positions import relative_positions
from pipeline.schedule import learning_rate_factor
from pipeline.sequences import SequenceStream
from pipeline.weights import load_commit_pair
from tests.commits import padded_ids, random_pair, run_config, write_commit
from tests.engines import RATE, rig, small_pair
from tests.reference import plain_adamw, plain_encoder, rtd_plain, transformers_encoder
from tests.reference.plain_judges import worst
from tests.reference.plain_replay import Replay
from tests.reference.plain_runs import NO_DROPOUT, SideBySide, training_gap
from tests.reference.plain_worlds import BATCH, HELDOUT, STEPS, launch_worlds
from tests.reference.released_repositories import Release
from tests.reference.small_networks import (
    VOCABULARY,
    generator,
    leaves,
    model_section,
    network_section,
)
from tests.worlds import rows

WORDS = "deberta.embeddings.word_embeddings.weight"
DELTA = "deberta.embeddings.word_embeddings._weight"
FP32_LOSS = 1e-5  # relative; sums in another order over some dozen steps


def test_trap_21_warmup_jump_and_bias_correction(world):
    """Rates around the end of the warm-up, `linear` by default; one step in closed form."""
    paper = {"warmup_steps": 10_000, "max_steps": 500_000}
    for decay, expected in (
        ("linear", {9_999: 0.9999, 10_000: 1.0, 499_999: 1 / 490_000, 500_000: 0.0}),
        ("linear_released", {9_999: 0.9999, 10_000: 0.98, 499_999: 1 / 500_000, 500_000: 0.0}),
    ):
        schedule = ScheduleSection(decay=decay, **paper)
        for step, factor in expected.items():
            assert learning_rate_factor(step, schedule) == pytest.approx(factor, rel=1e-9)
            plain = plain_adamw.learning_rate_factor(step, schedule)
            assert plain == pytest.approx(factor, rel=1e-9, abs=1e-12)
    assert ScheduleSection(**paper).decay == "linear"

    # m / (sqrt(v) + eps) of a first gradient g: 0.1 g / (sqrt(0.001) |g|), or g / |g|.
    for corrected, length in ((True, 1.0), (False, 0.1 / math.sqrt(0.001))):
        settings = {"betas": (0.9, 0.999), "bias_correction": corrected, "eps": 1e-12}
        one = rig(world, optimizer=settings, clipping=0.0)
        before = one.weights("generator")
        one.run(0)
        for name, after in one.weights("generator").items():
            if name.endswith("dense.bias"):
                moved = (after - before[name]).abs() / RATE
                torch.testing.assert_close(moved, torch.full_like(moved, length), rtol=2e-3, atol=0)
        # An epsilon above the gradients' rounding, which the first steps at full rate magnify.
        both = SideBySide(world, optimizer={**settings, "eps": 1e-4})
        for step in range(5):
            both.step(step)
        assert max(both.differences().values()) < 1e-5


@pytest.fixture(scope="module")
def worlds(dataset_folder, vocab_size, tmp_path_factory):
    """See `tests/reference/plain_worlds.py`."""
    return launch_worlds(tmp_path_factory.mktemp("worlds"), dataset_folder, vocab_size)


def assert_equals_the_reference(run, plain):
    """Losses and gradient norms of every step of a launched run."""
    logged = [row for row in rows(run) if "train/mlm_loss" in row]
    assert len(logged) == len(plain)
    for row, step in zip(logged, plain, strict=True):
        assert row["train/mlm_loss"] == pytest.approx(step.mlm_loss, rel=FP32_LOSS)
        assert row["train/rtd_loss"] == pytest.approx(step.rtd_loss, rel=FP32_LOSS)
        for network, norm in step.norms.items():
            assert row[f"optim/{network}_grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_trap_22_token_mean(world, worlds):
    """Any split of a batch with padding has the gradient of the global means; two ranks too."""
    for micro in (8, 4, 2, 1):
        findings = training_gap(world, micro=micro)
        assert worst(findings) < 1e-3, (micro, findings)
    assert_equals_the_reference(worlds.stage_2, worlds.plain)


def test_trap_23_es_and_decoupled(world):
    """Under ES the RTD loss alone moves E_G; under GDES it does not; ES decoupled is refused."""
    moved = {}
    for sharing in ("es", "gdes"):
        objective = ObjectiveSection(embedding_sharing=sharing, update="joint")
        one = rig(world, objective=objective, optimizer={"weight_decay": 0.0})
        one.module("joint").generator.register_forward_hook(
            lambda module, arguments, out: out._replace(loss_sum=out.loss_sum * 0.0)
        )
        before = one.weights("joint")
        one.run(0)
        after = one.weights("joint")
        moved[sharing] = {n for n in before if not torch.equal(before[n], after[n])}
        assert {n for n in before if n.startswith("discriminator.")} <= moved[sharing]
    assert {n for n in moved["es"] if n.startswith("generator.")} == {f"generator.{WORDS}"}
    assert {n for n in moved["gdes"] if n.startswith("generator.")} == set()
    with pytest.raises(ValueError, match=r'"es" needs objective.update=joint: .* would be lost'):
        ObjectiveSection(embedding_sharing="es", update="decoupled")


def test_trap_24_tied_softmax_under_zero_3(worlds):
    """What two ranks compute with partitioned E_G is what their commit, put together, computes."""
    assert_equals_the_reference(worlds.stage_3, worlds.plain)
    pair = load_commit_pair(find_commit(worlds.stage_3), worlds.config)
    mlm_loss, rtd_loss = Replay(worlds.config, BATCH, split="heldout").heldout(pair, HELDOUT)
    last = [row for row in rows(worlds.stage_3) if "eval/mlm_loss" in row][-1]
    assert last["step"] == STEPS
    assert last["eval/mlm_loss"] == pytest.approx(mlm_loss, rel=FP32_LOSS)
    assert last["eval/rtd_loss"] == pytest.approx(rtd_loss, rel=FP32_LOSS)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("micro_steps", [1, 4])
def test_trap_25_two_engines(world, stage, micro_steps):
    """Twenty steps of two engines equal the plain reference (DeepSpeed #4923)."""
    both = SideBySide(world, stage=stage, micro=8 // micro_steps)
    for step in range(20):
        both.step(step)
    assert both.findings.worst_loss() < 1e-6
    assert max(both.differences().values()) < 1e-5


def test_trap_26_resume(worlds):
    """Killed at some micro step and started again, a run repeats every figure and weight."""
    assert worlds.kill_code != 0
    assert 0 < worlds.killed_at < STEPS
    assert "continues" in worlds.output
    assert rows(worlds.killed) == rows(worlds.stage_2)
    commits = [run / "checkpoints" / f"step-{STEPS:08d}" for run in (worlds.killed, worlds.stage_2)]
    for network in ("generator", "discriminator"):
        for rank in range(2):
            name = f"{network}/rank-{rank:05d}.safetensors"
            assert (commits[0] / name).read_bytes() == (commits[1] / name).read_bytes()


def test_trap_27_export(dataset_folder, tmp_path):
    """AutoModel is the trained encoder; no Delta in the file; no head is left random."""
    from transformers import AutoModel, AutoModelForMaskedLM

    config = run_config(dataset_folder, tmp_path / "run")
    pair = random_pair(config, 7)
    write_commit(config, 40, pair)
    export_run(tmp_path / "run", tmp_path / "export")
    files = {n: tmp_path / "export" / n / "model.safetensors" for n in config.networks}
    tensors = {name: load_file(path) for name, path in files.items()}
    ours = {name: dict(getattr(pair, name).named_parameters()) for name in config.networks}
    merged = ours["generator"][WORDS] + ours["discriminator"].pop(DELTA)
    assert torch.equal(tensors["discriminator"].pop(WORDS), merged)
    assert tensors["discriminator"].keys() == ours["discriminator"].keys()
    for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "classifier.weight"):
        key = f"mask_predictions.{name}"
        assert torch.equal(tensors["discriminator"][key], ours["discriminator"][key])

    load = {"output_loading_info": True}
    theirs, loading = AutoModel.from_pretrained(files["discriminator"].parent, **load)
    assert not loading["missing_keys"]
    assert all(key.startswith("mask_predictions.") for key in loading["unexpected_keys"])
    masked, loading = AutoModelForMaskedLM.from_pretrained(files["generator"].parent, **load)
    assert not loading["missing_keys"]
    assert masked.config.legacy is False
    ids, mask = padded_ids(config.model.vocab_size)
    weights = {name: leaves(getattr(pair, name)) for name in config.networks}
    with torch.no_grad():
        found = theirs.eval()(ids, attention_mask=mask.long()).last_hidden_state
        _, states = rtd_plain.discriminator_states(
            weights["generator"],
            weights["discriminator"],
            config.discriminator,
            ids,
            mask,
            logits=plain_encoder.logits_at_once,
        )
    torch.testing.assert_close(found[mask], states[-1][mask], rtol=0, atol=1e-5)

    again = continued(config, tmp_path / "export", dataset_folder)
    for (name, parameter), original in zip(
        again.named_parameters(), pair.parameters(), strict=True
    ):
        difference = (parameter - original).abs().max()
        assert difference < 1e-6 if name.endswith("_weight") else difference == 0, name


def continued(config, path, dataset):
    """The networks of a run that goes on from a model."""
    begins = config.initialize.model_copy(update={"path": str(path)})
    tokenizer = Tokenizer.load(Dataset.open(dataset).tokenizer_folder)
    return initialize_pair(config.model_copy(update={"initialize": begins}), tokenizer).pair


@pytest.mark.parametrize("with_delta", [False, True])
def test_trap_28_continue_from_released_weights(with_delta, dataset_folder, tmp_path):
    """Delta := E_D - E_G: the first RTD loss is the released model's, not that of E_D = E_G."""
    config = run_config(dataset_folder, tmp_path / "run")
    release = Release(config)
    release.write(tmp_path / "release", generator="generator.bin", with_delta=with_delta)
    pair = continued(config, tmp_path / "release", dataset_folder)
    delta = pair.discriminator.deberta.embeddings.word_embeddings._weight
    table = release.table(torch.float32, from_delta=with_delta)
    torch.testing.assert_close(delta.detach(), table - release.generator[WORDS], rtol=0, atol=1e-7)
    ids, mask = padded_ids(config.model.vocab_size)
    labels = (torch.arange(ids.numel()).view(ids.shape) % 7 == 0).float()
    losses = {}
    for name, words in (("released", table), ("E_D = E_G", release.generator[WORDS])):
        losses[name] = rtd_plain.discriminator_step(
            {},
            {**release.discriminator, WORDS: words},
            config.discriminator,
            ids,
            mask,
            labels,
            sharing="nes",
            logits=plain_encoder.logits_at_once,
        ).loss_sum.item()
    rows_of_base = shared_rows(pair.generator, pair.discriminator, ids)
    ours = pair.discriminator(ids, rows_of_base, mask, labels, None).loss_sum.item()
    assert ours == pytest.approx(losses["released"], rel=1e-6)
    assert abs(losses["E_D = E_G"] / losses["released"] - 1) > 1e-3


def test_trap_29_tokenizer_parity(tokenizer_folder, corpus):
    """The shipped tokenizer gives SentencePiece's own ids; control strings in text stay text."""
    from transformers import AutoTokenizer

    raw = sentencepiece.SentencePieceProcessor(str(tokenizer_folder / "spm.model"))
    shipped, ours = (
        AutoTokenizer.from_pretrained(tokenizer_folder),
        Tokenizer.load(tokenizer_folder),
    )
    probes = [
        "of\ufb01ce \uff21\uff22\uff11",  # NFKC
        "\U0001f600 \U0001f44d\U0001f3fd",
        "\u6f22\u5b57 \ud55c\uae00",
        "no\u00a0break\u202fspace",
        "zero\u200bwidth\ufeffmark",
        "cafe\u0301 A\u030angstro\u0308m",
        "a\x07c \x7f",
        "\u2581 literal",
    ]
    for text in probes:
        assert shipped(text, add_special_tokens=False).input_ids == raw.encode(text), ascii(text)
        assert ours.encode(text) == raw.encode(text), ascii(text)
    for text in ("say [MASK] now", "[CLS]", "x[SEP]y [PAD]"):
        assert ours.encode(text) == raw.encode(text)
        assert not set(ours.encode(text)) & {0, 1, 2, ours.mask_id}, "text, not control ids"
    # Known and counted: the shipped one, as any of Hugging Face's, reads them as control ids.
    assert compare_tokenizers(tokenizer_folder, ["say [MASK]", "a <0x41>", "b"]).literals == 2
    lines = [line for path in corpus.iterdir() for line in path.read_text("utf-8").split("\n")]
    report = compare_tokenizers(tokenizer_folder, lines)
    print(f"{1e6 * report.mismatches / report.texts:.0f} mismatches in a million lines")
    assert report.mismatches == report.ties


def test_trap_30_packing(dataset_folder):
    """Rows are the concatenated documents, with nothing between them, and attention crosses."""
    dataset = Dataset.open(dataset_folder)
    stream = SequenceStream(dataset, "train", 64)
    batch = stream.batch(np.arange(20), np.zeros(20, np.int64))
    content = batch.input_ids_BL[:, 1:-1].flatten().tolist()
    expected, ends, number = [], [], 0
    while len(expected) < len(content):
        expected += dataset.document("train", number)[0].tolist()
        ends.append(len(expected))
        number += 1
    assert content == expected[: len(content)]
    row, column = next(divmod(end, 62) for end in ends if 10 < end % 62 < 50)

    ours = generator(
        layers=2,
        model=model_section(vocab_size=dataset.manifest.vocab_size + 100),
        max_position_embeddings=64,
    )
    ids = batch.input_ids_BL[row : row + 1].clone()
    before = ours.encode(ids, None)
    ids[0, column - 3] = 7 if ids[0, column - 3] != 7 else 8  # in the document before
    moved = (ours.encode(ids, None) - before).abs().amax(-1)[0]
    assert (moved[column + 1 :] > 1e-5).all(), "tokens of the next document see it"


@pytest.mark.parametrize("rule", ["clamp", "transformers"])
def test_trap_31_long_context(rule):
    """At length 600 the released rule never reads row 0; transformers' rule is transformers'."""
    sizes = {
        "position_buckets": 256,
        "max_relative_positions": 512,
        "max_position_embeddings": 600,
        "hidden_size": 12,
        "relative_position_rule": rule,
    }
    index = relative_positions(600, 256, 512, torch.device("cpu"), rule).index()[0]
    plain = plain_encoder.table_rows(600, 256, 512, rule)
    assert torch.equal(index, plain)
    assert (int(index.min()), int(index.max())) == ((1, 511) if rule == "clamp" else (0, 511))

    ours = generator(layers=1, **sizes)
    ids = torch.randint(4, 60, (1, 600), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 600, dtype=torch.bool)
    hidden = ours.encode(ids, None)
    hidden.square().sum().backward()
    row_0 = ours.deberta.encoder.rel_embeddings.weight.grad[0]
    assert bool(row_0.any()) == (rule == "transformers")
    section = network_section(1, **sizes)
    _, states = rtd_plain.generator_states(
        leaves(ours), section, ids, mask, plain_encoder.logits_at_once
    )
    torch.testing.assert_close(hidden, states[-1], rtol=0, atol=1e-5)
    weights = ours.deberta.state_dict()
    del weights["embeddings.position_embeddings.weight"]
    theirs = transformers_encoder.model(section, VOCABULARY, torch.float32, weights)
    with torch.no_grad():
        difference = (theirs(ids).last_hidden_state - hidden).abs().max()
    assert difference < 1e-5 if rule == "transformers" else difference > 1e-3


def test_trap_32_half_precision(world):
    """Scores stay far from fp16's limit; bf16 training stays near fp32; fp16 scores are finite."""
    objective = ObjectiveSection()
    losses = {}
    for precision in ("fp32", "bf16"):
        one = rig(world, precision=precision, pair=small_pair(objective, **NO_DROPOUT))
        found = torch.stack([one.run(step).sums for step in range(60)])
        losses[precision] = found[-20:].sum(0)[[0, 3]]
    drift = (losses["bf16"] / losses["fp32"] - 1).abs()
    assert (drift < 0.02).all(), drift

    largest = []

    def watched(*arguments):
        logits = plain_encoder.logits_at_once(*arguments)
        largest.append(logits.abs().max().item())
        return logits

    weights = {n: p.float() for n, p in one.weights("generator").items()}
    ids = torch.randint(4, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    rtd_plain.generator_states(
        weights, network_section(2), ids, torch.ones(4, 12, dtype=torch.bool), watched
    )
    print(f"largest |score| {max(largest):.3g}, drift {drift.tolist()}")
    assert 0.0 < max(largest) < 1e3

    # Products of 102,400 do not fit into fp16; scaled before the product they are 7,390.
    loud = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)
    quiet = torch.zeros(1, 8, 64, dtype=torch.float16)
    geometry = relative_positions(4, 4, 11, torch.device("cpu"))
    assert (loud @ loud.mT).isinf().all()
    for backend in ("eager", "torch"):
        keys = KeySide(loud, loud, quiet, quiet)
        out = disentangled_attention(backend, loud, keys, geometry, None, 0.0, None)
        assert out.isfinite().all()
