"""The reference in bf16, fp16 and autocast: fp32 masters, low precision passes, no engine.

Forward and backward passes are those of the networks themselves, one micro batch after another;
gradients are added, clipped and applied in fp32 by the plain AdamW of `tests.reference`. A low
precision rounds in every operation, so a reference that rounded elsewhere would differ by more than
any mistake of an engine. `tests/numerics` holds the networks themselves in every precision.
"""

from contextlib import nullcontext
from unittest import mock

import torch

from pipeline.modeling.pair import shared_rows
from pipeline.rtd import corrupt
from tests.engines import sequence_batch, small_pair
from tests.matrix.cells import (
    CLIPPING,
    FIRST_SCALE_POWER,
    SCALE_WINDOW_STEPS,
    TRAIN_BATCH_SIZE,
)
from tests.matrix.shared_run import POISONED_STEPS, STEPS, objective_keys, run_config, samples_of
from tests.matrix.truth import Truth, TruthKey
from tests.reference.plain_adamw import PlainAdamW, learning_rate_factor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}


class LossScale:
    """Dynamic loss scaling: halved by a second overflow, doubled after a window without any.

    The rule of Megatron-LM and DeepSpeed (`hysteresis` 2): the first overflow only skips its step.
    """

    def __init__(self, power, window):
        self.value, self.window = 2.0**power, window
        self.patience = 2
        self.since_overflow = 0

    def update(self, overflowed):
        """Look at one step."""
        if overflowed:
            if self.patience == 1:
                self.value = max(self.value / 2, 1.0)
            else:
                self.patience -= 1
            self.since_overflow = 0
        else:
            if self.since_overflow and self.since_overflow % self.window == 0:
                self.patience = 2
                self.value *= 2
            self.since_overflow += 1


def split(inputs, weight, bias=None):
    """A Linear as ZeRO-3 computes it: the product is rounded before the bias is added."""
    product = inputs.matmul(weight.t())
    if bias is not None:
        product += bias
    return product


LINEAR = {"fused": torch.nn.functional.linear, "split": split}


class LowPrecision:
    """A run with fp32 masters whose passes are in a lower precision."""

    def __init__(self, key: TruthKey, drawn: torch.Tensor) -> None:
        self.key, self.drawn = key, drawn
        self.config = run_config(key.update)
        self.keys = objective_keys(self.config)
        self.pair = small_pair(config=self.config)
        modules = self.pair.trained_modules()
        masters = {
            name: {k: p.detach().clone() for k, p in module.named_parameters()}
            for name, module in modules.items()
        }
        self.pair.to(DTYPES[key.precision])
        self.parameters = {name: dict(m.named_parameters()) for name, m in modules.items()}
        self.adam = {
            name: PlainAdamW(weights, self.config.optimizer, CLIPPING)
            for name, weights in masters.items()
        }
        self.scales = {name: LossScale(FIRST_SCALE_POWER, SCALE_WINDOW_STEPS) for name in modules}
        self.passes = nullcontext()
        if key.precision == "autocast":
            self.passes = torch.autocast("cpu", torch.bfloat16)

    def train(self) -> Truth:
        """All steps."""
        with mock.patch.object(torch.nn.functional, "linear", LINEAR[self.key.linear]):
            found = [self.step(number) for number in range(STEPS)]
        losses, norms = zip(*found, strict=True)
        return Truth(
            torch.tensor(losses, dtype=torch.float64),
            self.drawn,
            {
                name: torch.tensor([each[name] for each in norms], dtype=torch.float64)
                for name in self.adam
            },
            {
                f"{engine}/{name}": w
                for engine, adam in self.adam.items()
                for name, w in adam.weights.items()
            },
        )

    def step(self, number):
        """Losses (MLM, RTD), and the norm of each optimizer's step."""
        size = TRAIN_BATCH_SIZE // self.key.micro_batches
        batches = [
            sequence_batch(samples_of(number, micro_step, 0, size, 1))
            for micro_step in range(self.key.micro_batches)
        ]
        slots = [self.keys.mask(batch) for batch in batches]
        # In fp32, as the step has them: a last bit here is a flipped bf16 rounding there.
        masked = torch.tensor(sum(int(each.valid_BK.sum()) for each in slots)).float()
        tokens = torch.tensor(sum(int(batch.lengths_B.sum()) for batch in batches)).float()
        self.gradients = {
            engine: {name: torch.zeros_like(w) for name, w in adam.weights.items()}
            for engine, adam in self.adam.items()
        }
        outputs, norms = [], {}
        joint = self.key.update == "joint"
        for batch, each in zip(batches, slots, strict=True):
            output = self.generate(batch, each)
            if self.key.precision == "fp16" and number in POISONED_STEPS and not outputs:
                output = output._replace(loss_sum=output.loss_sum * float("inf"))
            outputs.append(output)
            if not joint:
                self.differentiate("generator", outputs[-1].loss_sum * (1 / masked))
        if not joint:
            norms["generator"] = self.update("generator", number)
        rtd_sum = 0.0
        drawn = self.drawn[number].split(size)
        for batch, each, mlm, ids in zip(batches, slots, outputs, drawn, strict=True):
            detected = self.detect(batch, each, ids)
            rtd_sum += float(detected.detach())
            loss = detected * (1 / tokens) * self.config.objective.rtd_loss_weight
            if joint:
                self.differentiate("joint", mlm.loss_sum * (1 / masked) + loss)
            else:
                self.differentiate("discriminator", loss)
        last = "joint" if joint else "discriminator"
        norms[last] = self.update(last, number)
        mlm_sum = sum(float(output.loss_sum.detach()) for output in outputs)
        return (mlm_sum / float(masked), rtd_sum / float(tokens)), norms

    def generate(self, batch, slots):
        """The generator's output."""
        with self.passes:
            return self.pair.generator(
                slots.masked_ids_BL,
                batch.attention_mask(),
                slots.positions_BK,
                slots.valid_BK,
                slots.targets_BK,
                self.keys.draw(batch),
                None,
            )

    def detect(self, batch, slots, drawn):
        """The discriminator's sum of losses."""
        corrupted = corrupt(batch.input_ids_BL, slots.positions_BK, slots.valid_BK, drawn)
        assert self.pair.discriminator is not None
        with self.passes:
            return self.pair.discriminator(
                corrupted.input_ids_BL,
                shared_rows(self.pair.generator, self.pair.discriminator, corrupted.input_ids_BL),
                batch.attention_mask(),
                corrupted.is_replaced_BL.float(),
                None,
            ).loss_sum

    def differentiate(self, engine, loss):
        """Add a micro batch's gradient to the step's, in fp32."""
        scale = self.scales[engine].value if self.key.precision == "fp16" else 1.0
        named = self.parameters[engine]
        gradients = torch.autograd.grad(loss * scale, list(named.values()))
        for name, gradient in zip(named, gradients, strict=True):
            self.gradients[engine][name] += gradient.float()

    def update(self, engine, number):
        """Step with the sum, if it is finite; the norm before clipping."""
        gradients, adam = self.gradients[engine], self.adam[engine]
        is_finite = all(bool(g.isfinite().all()) for g in gradients.values())
        if self.key.precision == "fp16":
            gradients = {name: g / self.scales[engine].value for name, g in gradients.items()}
            self.scales[engine].update(not is_finite)
        if not is_finite:
            return float("nan")
        factor = learning_rate_factor(number, self.config.schedule)
        rates = {}
        for name in gradients:
            network = name.split(".")[0] if engine == "joint" else engine
            rates[name] = factor * self.config.optimizer.learning_rate(network)
        norm = adam.step(gradients, rates)
        with torch.no_grad():
            for name, parameter in self.parameters[engine].items():
                parameter.copy_(adam.weights[name])
        return norm
