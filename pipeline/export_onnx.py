"""An encoder or a fine-tuned model as ONNX, compared with torch on real text before it appears.

    REPOSITORY/onnx/model.onnx        fp32; any number of sequences of 2 to max_position_embeddings
                                      tokens; inputs input_ids and attention_mask, int64 [B, L]
    REPOSITORY/onnx/model_int8.onnx   weights of matrices and tables in int8, activations in int8 by
                                      the range of each call ("dynamic")

torch's exporter traces transformers' own model. Only the table of relative positions is put in as
it is: it comes from a logarithm that is rounded up, and a runtime whose logarithm differs in the
last bit could put a distance into another bucket.

The older exporter (`dynamo=False`) writes a graph of this model that computes something else, which
is why nothing is believed before it is compared.

Letters: B sequences, L sequence length, D hidden size, C classes.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.onnx_text import probe_inputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FOLDER = "onnx"
FP32_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4
"""Largest distance from torch in fp32, relative to the largest output where that is above 1."""
INT8_TOLERANCE = 0.5
"""Largest norm of the distance from torch in int8, relative to torch's: more is no rounding."""
_SEQUENCE_CLASS = "DebertaV2ForSequenceClassification"
OUTPUTS = {
    "DebertaV2Model": ("last_hidden_state",),
    _SEQUENCE_CLASS: ("logits",),
    "DebertaV2ForTokenClassification": ("logits",),
    "DebertaV2ForQuestionAnswering": ("start_logits", "end_logits"),
}
"""Classes that can be exported, and what the graphs give; of sequences in one case, else of
tokens."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGE_BYTES = 1_500_000_000
"""Above, weights lie in a file of their own: a graph with them may have 2 GB."""

OnnxForm = Literal["fp32", "int8"]
Inputs = dict[str, torch.Tensor]
Outputs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> values and where in the whole output they stand."""


@dataclass(frozen=True)
class OnnxFigures:
    """How close a graph is to torch."""

    file: str
    bytes: int
    max_difference: float
    """Over all outputs at tokens that are not padding."""
    tolerance: float | None
    """Of max_difference; None in int8."""
    relative_distance: float
    """Norm of the differences, relative to the norm of torch's outputs."""


@dataclass(frozen=True)
class OnnxReport:
    """What was exported, and how it was compared."""

    model: str
    sequences: int
    """Real sentences, and one sequence as long as the model takes."""
    tokens: int
    figures: tuple[OnnxFigures, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        return asdict(self)


def check_onnx_packages() -> None:
    """Insist on what ONNX needs.

    Raises:
        UserError: A package is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install -c constraints.txt -e '.[onnx]'"
        )


def export_onnx(
    repository: Path, *, int8: bool = False, text: Path | None = None, force: bool = False
) -> OnnxReport:
    """Write a model's graphs into its folder `onnx`, where they are close to torch.

    Args:
        repository: Folder with config.json, weights and tokenizer: an exported discriminator, or a
            model fine-tuned from one.
        int8: Write the int8 graph too.
        text: Text to compare on; the project's sample corpus where None.
        force: Replace an earlier folder.

    Returns:
        What was written.

    Raises:
        UserError: A package is missing, the folder is not such a model or is in the way, or a graph
            computes something else; what was there is unchanged.
    """
    check_onnx_packages()
    output = repository / FOLDER
    if output.exists() and not force:
        raise UserError(f"{output} exists: replace it with --force")
    model = _load(repository)
    names = OUTPUTS[type(model).__name__]
    batches = probe_inputs(repository, model.config.max_position_embeddings, text)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=repository) as name:
        partial = Path(name) / FOLDER
        partial.mkdir()
        # Before the graph is traced, which changes the model.
        pairs = [(batch, _by_torch(model, batch)) for batch in batches]
        _write_graph(model, names, partial / FP32_FILE)
        files = [FP32_FILE]
        if int8:
            _quantize(partial / FP32_FILE, partial / INT8_FILE)
            files.append(INT8_FILE)
        figures = tuple(_compare(partial / file, pairs) for file in files)
        if output.exists():
            output.rename(Path(name) / "replaced")
        partial.rename(output)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    return OnnxReport(str(repository), sequences, tokens, figures, _versions())


def open_graph(path: Path) -> "InferenceSession":
    """Open a graph on the CPU.

    Args:
        path: The .onnx file.

    Returns:
        onnxruntime's session, with as many threads as torch has.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", *_PACKAGES)}


def _load(repository: Path) -> Any:
    """Load the model in fp32."""
    import transformers

    from pipeline.evaluate.heads import loaded_from

    try:
        values = json.loads((repository / "config.json").read_text(encoding="utf-8"))
        kind = values["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{repository}: no repository of a model (config.json with `architectures`: "
            f"{error}); name an exported discriminator or a fine-tuned model"
        ) from error
    if kind not in OUTPUTS:
        raise UserError(
            f"{repository / 'config.json'}: {kind} has no ONNX form here; there are "
            f"{', '.join(OUTPUTS)}"
        )
    transformers.utils.logging.set_verbosity_error()  # a head that is left out is no news
    transformers.utils.logging.disable_progress_bar()
    with loaded_from(repository):
        model, info = getattr(transformers, kind).from_pretrained(
            repository,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise UserError(f"{repository}: weights are missing: {sorted(info['missing_keys'])}")
    return model.eval()


class _Traced(nn.Module):
    """A model with positional inputs and a tuple of outputs, its relative positions constant.

    The model's encoder takes its positions from here from now on.
    """

    def __init__(self, model: Any, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names
        encoder = model.base_model.encoder
        self._longest = model.config.max_position_embeddings
        if encoder.relative_attention:
            square_1LL = encoder.get_rel_pos(torch.zeros(1, self._longest, 1))
            ahead, behind = square_1LL[0, 0].flip(0), square_1LL[0, 1:, 0]
            self.register_buffer("bucket_of_distance", torch.cat([ahead, behind]))
            encoder.get_rel_pos = self._relative_positions

    def _relative_positions(
        self, hidden_BLD: torch.Tensor, query_BLD: Any = None, relative_pos: Any = None
    ) -> torch.Tensor:
        """Stand in for the encoder's method of the same purpose; [1, L, L]."""
        places_L = torch.arange(hidden_BLD.size(1))
        distances_LL = places_L[:, None] - places_L[None, :]
        buckets: Any = self.bucket_of_distance
        return buckets[distances_LL + (self._longest - 1)].unsqueeze(0)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(output[name] for name in self.names)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what the exporter tells its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_graph(model: Any, names: Sequence[str], path: Path) -> None:
    """Trace a model and write its graph."""
    from torch.export import Dim

    ids_BL = torch.full((2, 17), 3)
    axes = {
        0: Dim("batch", min=1),
        1: Dim("length", min=2, max=model.config.max_position_embeddings),
    }
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with _quietly():
            torch.onnx.export(
                _Traced(model, names),
                (ids_BL, torch.ones_like(ids_BL)),
                str(path),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=list(names),
                dynamic_shapes=(axes, axes),
                external_data=size > _LARGE_BYTES,
            )
    except torch.onnx.OnnxExporterError as error:
        made = ", ".join(f"{name} {number}" for name, number in _versions().items())
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"this model gives no graph with {made} ({first}); nothing was written: install the "
            "versions of constraints.txt"
        ) from error


def _quantize(source: Path, target: Path) -> None:
    """Write the int8 graph of an fp32 graph."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source)
    # The quantizer transposes weights and would not believe the shapes that stand there.
    del graph.graph.value_info[:]
    with _quietly():
        quantize_dynamic(
            graph,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=source.with_name(source.name + ".data").exists(),
        )


@torch.no_grad()
def _by_torch(model: Any, batch: Inputs) -> Outputs:
    """Compute what a graph must give: by name, of the places that are compared."""
    output = model(**batch)
    kind = type(model).__name__
    places_BL = batch["attention_mask"].bool()
    everything = torch.ones(len(places_BL), dtype=torch.bool)
    compared = everything if kind == _SEQUENCE_CLASS else places_BL
    return {name: (output[name][compared], compared) for name in OUTPUTS[kind]}


def _compare(path: Path, pairs: Sequence[tuple[Inputs, Outputs]]) -> OnnxFigures:
    """Run a graph on all batches, and refuse it where it computes something else."""
    session = open_graph(path)
    largest, scale, squares, all_squares = 0.0, 1.0, 0.0, 0.0
    for batch, expected in pairs:
        inputs = {key: tensor.numpy() for key, tensor in batch.items()}
        arrays = session.run(list(expected), inputs)
        for array, (known, compared) in zip(arrays, expected.values(), strict=True):
            difference = torch.from_numpy(array)[compared] - known
            # A number that is none must not be passed over by max().
            largest = max(largest, float(difference.abs().nan_to_num(float("inf")).max()))
            scale = max(scale, float(known.abs().max()))
            squares += float(difference.double().square().sum())
            all_squares += float(known.double().square().sum())
    distance = (squares / all_squares) ** 0.5
    is_int8 = path.name == INT8_FILE
    allowed = INT8_TOLERANCE if is_int8 else TOLERANCE * scale
    # Written so that NaN fails.
    if not (distance if is_int8 else largest) <= allowed:
        raise UserError(
            f"{path.name} does not compute what torch does: outputs differ by up to "
            f"{largest:.3g}, {distance:.3g} of their norm (allowed {allowed:.3g}); nothing was "
            "written"
        )
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    return OnnxFigures(path.name, size, largest, None if is_int8 else allowed, distance)
