"""What is wrong with a DeepSpeed JSON: every finding, in the order of reading.

1. Keys written twice and "auto": text that means something else than it says.
2. Names, types and bounds, by `pipeline.ds_schema`.
3. Rules that join keys: one precision, its ZeRO stage, gradient accumulation, batch.

The rules look at the raw document, so that a wrong type elsewhere does not hide them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config_files import JsonObject
from pipeline.ds_schema import REFUSED, DeepSpeedJson, ZeroOptimization
from pipeline.findings import describe_error, dotted, model_at, nearest

Precision = Literal["fp32", "bf16", "fp16", "autocast"]

_PRECISION_BLOCKS: dict[str, Precision] = {
    "bf16": "bf16",
    "fp16": "fp16",
    "torch_autocast": "autocast",
}
_STAGE3_KEYS = tuple(
    key
    for key in ZeroOptimization.model_fields
    if key.startswith(("stage3_", "zero_hpz", "zero_quantized", "offload_param"))
)


def enabled_precisions(document: Mapping[str, Any]) -> list[Precision]:
    """List the low precisions that are switched on.

    Args:
        document: A DeepSpeed JSON, checked or not.

    Returns:
        None of them for fp32; more than one is an error.
    """
    return [
        precision
        for key, precision in _PRECISION_BLOCKS.items()
        if _block(document, key).get("enabled") is True
    ]


def findings(document: Mapping[str, Any]) -> list[str]:
    """Check a DeepSpeed JSON.

    Args:
        document: The JSON object; `JsonObject` where duplicates are to be found.

    Returns:
        One line for each problem, without the name of the file; empty if there is none.
    """
    spelling = dict(_spelling(document, ""))
    return [
        *(f"{path} {words}" for path, words in spelling.items()),
        *_schema(document, told=set(spelling)),
        *_precision(document),
        *_zero(document),
        *_batch(document),
    ]


def _block(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A block of the document, or an empty one if it is missing or of a wrong type."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _spelling(node: object, path: str) -> Iterator[tuple[str, str]]:
    """Paths of duplicate keys and of the string "auto", with what is wrong there."""
    if node == "auto":
        yield path, 'is "auto"; write a value: nothing fills it in here'
    if isinstance(node, JsonObject):
        for name in node.duplicates:
            yield f"{path}.{name}".lstrip("."), "is written twice; keep one"
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _spelling(value, f"{path}.{name}".lstrip("."))
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from _spelling(value, f"{path}[{index}]")


def _schema(document: Mapping[str, Any], told: set[str]) -> Iterator[str]:
    """Unknown and refused names, wrong types, values out of bounds, missing keys."""
    try:
        DeepSpeedJson.model_validate(document)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            location = problem["loc"]
            path = dotted(location)
            if path in told:
                continue
            if problem["type"] == "missing":
                yield f"{path} is missing{_CURE_OF_MISSING.get(path, '')}"
            elif problem["type"] == "extra_forbidden":
                yield _unknown_key(location)
            else:
                yield f"{path} {describe_error(problem)}"


_CURE_OF_MISSING = {
    "train_batch_size": ": sequences in one optimizer step over all GPUs, e.g. 8192",
    "train_micro_batch_size_per_gpu": ": sequences in one forward pass of one GPU, e.g. 32",
    "gradient_clipping": '; write "gradient_clipping": 1.0 (the paper\'s), or 0.0 for none',
    "zero_optimization": '; write "zero_optimization": {"stage": 1} (0 shards nothing)',
    "zero_optimization.stage": "; write 0, 1, 2 or 3",
}


def _unknown_key(location: tuple[str | int, ...]) -> str:
    """The finding about a name that is not in the schema."""
    path = dotted(location)
    if path in REFUSED:
        return f"{path} {REFUSED[path]}"
    name, allowed = str(location[-1]), model_at(DeepSpeedJson, location[:-1]).model_fields
    danger = ""
    if len(location) == 1:
        effect = "train in fp32" if _looks_like_precision(name) else "train without it"
        danger = f"  (DeepSpeed would ignore it and {effect})"
    return f"unknown key '{path}'{nearest(name, allowed)}{danger}"


def _looks_like_precision(name: str) -> bool:
    """Whether an unknown name was probably meant to set the precision."""
    return any(word in name.lower() for word in ("16", "autocast", "float", "half", "amp"))


def _precision(document: Mapping[str, Any]) -> Iterator[str]:
    """Exactly one precision, said aloud, at a stage that computes it right."""
    enabled = enabled_precisions(document)
    stage = _block(document, "zero_optimization").get("stage")
    if not any(key in document for key in _PRECISION_BLOCKS):
        yield (
            'no precision is chosen; write "bf16": {"enabled": true}, or for fp32'
            ' "bf16": {"enabled": false}'
        )
    if len(enabled) > 1:
        yield f"two precisions are enabled, {' and '.join(enabled)}; keep one"
    low = [precision for precision in enabled if precision in ("bf16", "fp16")]
    if low and stage == 0:
        yield (
            f"{low[0]} at ZeRO stage 0: DeepSpeed 0.19.8 counts Adam's steps wrong there;"
            " write zero_optimization.stage 1, which on one GPU costs nothing"
        )
    added = _block(document, "data_types").get("grad_accum_dtype")
    if low and added is None:
        yield (
            f"{low[0]} without data_types.grad_accum_dtype would add up gradients in {low[0]};"
            ' write "data_types": {"grad_accum_dtype": "fp32"}'
        )
    if added is not None and added in ("bf16", "fp16") and added not in low:
        yield f"data_types.grad_accum_dtype is {added}, but the weights are not; write fp32"
    autocast = _block(document, "torch_autocast")
    if autocast.get("enabled") is True and autocast.get("dtype") is None:
        yield 'torch_autocast.dtype is missing; write "dtype": "bfloat16"'


def _zero(document: Mapping[str, Any]) -> Iterator[str]:
    """Keys that have no effect at the chosen stage."""
    zero = _block(document, "zero_optimization")
    stage = zero.get("stage")
    if stage != 3 and stage in (0, 1, 2):
        for key in _STAGE3_KEYS:
            if key in zero:
                yield f"zero_optimization.{key} needs stage 3, not {stage}; remove it"
    if stage == 0 and "offload_optimizer" in zero:
        yield "zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0"


def _batch(document: Mapping[str, Any]) -> Iterator[str]:
    """A batch that no number of GPUs could split."""
    batch = document.get("train_batch_size")
    micro = document.get("train_micro_batch_size_per_gpu")
    if type(batch) is int and type(micro) is int and batch > 0 and micro > 0 and batch % micro:
        yield (
            f"train_batch_size {batch} is not a multiple of train_micro_batch_size_per_gpu {micro};"
            f" the nearest that are: {', '.join(map(str, multiples_near(batch, micro)))}"
        )


def multiples_near(number: int, factor: int) -> list[int]:
    """Find the multiples of a factor next to a number.

    Args:
        number: A positive number.
        factor: A positive number.

    Returns:
        One or two of them in increasing order, without 0.
    """
    below = number - number % factor
    return [n for n in (below, below + factor) if n > 0]
