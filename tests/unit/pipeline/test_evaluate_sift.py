"""SiFT against a plain derivation that uses no hook, and as an option of fine-tuning."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
)

from data_prep.errors import UserError
from pipeline.evaluate.features import IGNORED, Batch, collate
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.sift import Sift, SiftOptions, divergence
from pipeline.evaluate.stepping import AloneStrategy, batch_loss
from pipeline.evaluate.training import train

OPTIONS = SiftOptions(vat_lambda=3.0, vat_learning_rate=0.05, vat_init_perturbation=0.1)


def config(num_labels):
    return DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=32,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.3,
        num_labels=num_labels,
    )


def batch(labels, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50, (len(labels), 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return Batch(ids, mask, torch.tensor(labels, dtype=dtype), None)


def plain_divergence(first, second):
    """Sums over classes, term by term; of one class the squared difference."""
    if first.shape[1] == 1:
        return ((first - second) ** 2).sum(1)
    p, q = torch.softmax(first, 1), torch.softmax(second, 1)
    forth = (q.detach() * (torch.log(q.detach()) - torch.log(p))).sum(1)
    back = (p.detach() * (torch.log(p.detach()) - torch.log(q))).sum(1)
    return forth + back


def plain_sift(model, inputs, clean_and_perturbed_logits):
    """The loss by its definition, on embeddings that are handed to the model."""
    words_BLD = model.deberta.embeddings.word_embeddings(inputs.input_ids)
    mean, variance = words_BLD.mean(-1, True), words_BLD.var(-1, unbiased=False, keepdim=True)
    normal_BLD = (words_BLD - mean) / torch.sqrt(variance + 1e-7)

    def logits(embeddings_BLD):
        return model(inputs_embeds=embeddings_BLD, attention_mask=inputs.mask).logits

    clean = logits(normal_BLD)
    noise_BLD = 0.1 * torch.randn(words_BLD.shape)
    delta_BLD = noise_BLD.clamp(-0.2, 0.2).requires_grad_()
    constant_BLD = normal_BLD.detach()
    worse = plain_divergence(
        clean_and_perturbed_logits(logits(constant_BLD + delta_BLD)),
        clean_and_perturbed_logits(clean.detach()),
    ).sum()
    (gradient,) = torch.autograd.grad(worse, delta_BLD)
    largest = gradient.abs().max(-1, keepdim=True).values
    delta_BLD = delta_BLD.detach() + 0.05 * gradient / (1e-6 + largest)
    perturbed = logits(constant_BLD + delta_BLD)
    chosen = [clean_and_perturbed_logits(x) for x in (perturbed, clean)]
    return clean, 3.0 * plain_divergence(*chosen).mean()


@pytest.mark.parametrize(
    ("kind_name", "labels", "outputs"),
    [
        ("classification", [[0], [2], [1]], 3),
        ("regression", [[0.5], [1.5], [2.5]], 1),
        ("tagging", [[IGNORED, 0, 1, IGNORED, 2, *[IGNORED] * 4], [IGNORED, *[1] * 8]], 3),
    ],
)
def test_sift_is_its_definition(kind_name, labels, outputs):
    kind, num_outputs = find_kind(kind_name, ["a", "b", "c"])
    assert num_outputs == outputs
    inputs = batch(labels, kind.label_dtype)
    is_tagging = kind_name == "tagging"
    head = DebertaV2ForTokenClassification if is_tagging else DebertaV2ForSequenceClassification
    torch.manual_seed(0)
    model = head(config(num_outputs)).train()

    def chosen(logits):
        return logits[inputs.labels != IGNORED] if is_tagging else logits

    torch.manual_seed(5)
    clean, extra = plain_sift(model, inputs, chosen)
    expected = kind.loss(clean, inputs) + extra
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)

    torch.manual_seed(5)
    found = batch_loss(kind, model, inputs, Sift(model, OPTIONS).attach())
    found.backward()
    assert extra.item() > 0.01
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        theirs = torch.zeros_like(parameter) if gradient is None else gradient
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = 1e-4 * (1 + theirs.abs().max())
        assert (ours - theirs).abs().max() < scale, name


def test_divergence_on_paper():
    first, second = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    # p = (0.2689, 0.7311), q the other way round: 2 x (0.7311 - 0.2689) x 1
    assert divergence(first, second).item() == pytest.approx(2 * 0.462117, abs=1e-5)
    assert divergence(first, first).item() == 0.0
    assert divergence(torch.tensor([[3.0]]), torch.tensor([[1.0]])).item() == 4.0
    impossible = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    assert divergence(impossible, impossible).item() == 0.0


def test_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(config(3)).eval()
    kind, _ = find_kind("classification", ["a", "b", "c"])
    inputs = batch([[0], [1]])
    before = kind.logits(model, inputs)
    sift = Sift(model, OPTIONS).attach()
    logits = kind.logits(model, inputs)
    # The LayerNorm behind makes nothing of a normalisation before it.
    assert torch.allclose(logits, before, atol=1e-4)
    sift.loss(kind, inputs, logits)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.allclose(kind.logits(model, inputs), logits)
    sift.detach()
    assert torch.equal(kind.logits(model, inputs), before)
    with pytest.raises(UserError, match=r"--sift: the model has 0 modules embeddings.LayerNorm"):
        Sift(torch.nn.Linear(2, 2), OPTIONS)
    with pytest.raises(UserError, match=r"--vat-learning-rate 0.0: give a positive number"):
        SiftOptions(vat_learning_rate=0.0)


def test_training_makes_outputs_smooth(tokenizer):
    """With SiFT the same perturbations change the outputs less, which is its purpose."""
    from pipeline.evaluate.examples import TextExample
    from pipeline.evaluate.kind import Limits

    kind, _ = find_kind("classification", ["a", "b"])
    texts = [f"{('war', 'peace')[i % 2]} {i} of the people" for i in range(24)]
    examples = [TextExample(i, text, None, i % 2) for i, text in enumerate(texts)]
    features = kind.features(examples, tokenizer, Limits(16))
    changes = {}
    for sift in (None, SiftOptions(5.0, 0.1, 0.3)):
        torch.manual_seed(0)
        sizes = config(2)
        sizes.vocab_size = 700
        model = DebertaV2ForSequenceClassification(sizes)
        plan = TrainingPlan(25, 3e-3, 8, sift=sift)
        stepper = AloneStrategy(torch.device("cpu")).start(model, kind, plan)
        train(stepper, features, plan, 0)
        stepper.close()
        assert not model.deberta.embeddings.LayerNorm._forward_pre_hooks
        inputs = collate(features, torch.device("cpu"), torch.int64)
        torch.manual_seed(1)
        probe = Sift(model.eval(), SiftOptions(1.0, 0.1, 0.3)).attach()
        clean = kind.logits(model, inputs)
        changes[sift is not None] = probe.loss(kind, inputs, clean).item()
        accuracy = (clean.argmax(-1) == inputs.labels[:, 0]).float().mean()
        assert accuracy > 0.9
        assert F.cross_entropy(clean, inputs.labels[:, 0]) < 0.6
    assert changes[True] < 0.7 * changes[False]


def test_sift_is_an_option_of_the_command(exported, tmp_path, capsys):
    from pipeline.commands_evaluate import evaluate_command
    from tests.task_files import write_glue

    for name in ("train", "test"):
        rows = [{"text": f"war {i}", "label": i % 2} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"seeds": 1, "epochs": 1, "max_length": 16, "device": "cpu", "as_json": True}
    how |= {"sift": True, "vat_lambda": 2.0}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    evaluate_command(exported.folder, **files, **how)
    printed = json.loads(capsys.readouterr().out)
    assert printed["finetune"]["options"]["sift"]["vat_lambda"] == 2.0
    glue = str(write_glue(tmp_path / "glue"))
    evaluate_command(exported.folder, task="rte", data=glue, results=tmp_path / "results", **how)
    kept = json.loads((tmp_path / "results" / "rte" / "pretrained-seed-0.json").read_text())
    assert kept["settings"]["sift"]["vat_init_perturbation"] == 0.01
