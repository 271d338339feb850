"""Bytes and kernels of one encoder layer at the shape of large, counted without a device: exact.

TrafficCounter        every operation of torch: the bytes that it reads and writes, one launch
operator_bytes        what an operator of ours moves inside, as it documents; its operands alone
                      where it says nothing
GraphCounter          a compiler that compiles nothing: Inductor's own count of the bytes of a
                      graph after its fusions (as scheduled for a CPU), and of its kernels
our_traffic, transformers_traffic   a layer forward and backward on meta tensors
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

from pipeline.config import ModelSection, NetworkSection
from pipeline.config_loading import load_run_config
from pipeline.counter_rng import DropoutKey
from pipeline.flops import training_flops_per_token
from pipeline.masking import num_masked_slots
from pipeline.modeling import compiled as compiled_module
from pipeline.modeling.kernels.traffic import (
    AttentionShape,
    backward_traffic,
    forward_traffic,
    hidden_bytes,
)
from pipeline.modeling.layer import EncoderLayer, LayerContext
from pipeline.modeling.pair import NetworkPair, shared_rows
from pipeline.modeling.relative_positions import relative_positions
from pipeline.rtd import DrawKey, corrupt

SEQUENCES, LENGTH, WIDTH, HEADS, TABLE_ROWS = 16, 512, 1024, 16, 512
META = torch.device("meta")
WITHOUT_TRAFFIC = {"empty", "empty_like", "new_empty", "_unsafe_view", "empty_strided"}
OUR_OPERATORS = 2
"""The fused attention's forward and backward passes, which count as one launch each."""


@dataclass(frozen=True)
class Traffic:
    """What a layer moves, forward and backward."""

    kib_per_token: float
    launches: int
    """Operations that are kernels on a GPU, a fused one counting once."""


def operand_bytes(*trees: Any) -> int:
    """Bytes of the tensors in some arguments and results."""
    leaves = tree_leaves(trees)
    tensors = {id(t): t for t in leaves if isinstance(t, torch.Tensor)}.values()
    # An expanded tensor is read from cache, not from memory: count what is stored.
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def hidden_traffic() -> tuple[int, int]:
    """What the fused attention moves inside, as it documents: bytes and steps, both passes."""
    shape = AttentionShape(HEADS, WIDTH // HEADS, LENGTH, TABLE_ROWS, SEQUENCES)
    steps = len(forward_traffic(shape)) + len(backward_traffic(shape))
    return round(hidden_bytes(shape) * SEQUENCES * LENGTH), steps


class TrafficCounter(TorchDispatchMode):
    """Sums the bytes of what every operation but views reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work under this mode; `GraphCounter` counts its graphs."""
        return True

    def add(self, count: int, launches: int = 1) -> None:
        """Count what no operation of torch shows."""
        self.bytes += count
        self.launches += launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in WITHOUT_TRAFFIC:
            self.add(operand_bytes(args, kwargs, result))
        return result

    @property
    def traffic(self) -> Traffic:
        """Of the layer that ran under it."""
        return Traffic(self.bytes / 1024 / (SEQUENCES * LENGTH), self.launches)


class GraphCounter:
    """In the place of a compiler: counts each graph once, and adds that whenever it runs."""

    def __init__(self, counter: TrafficCounter) -> None:
        self.counter = counter

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import make_boxed_func

        moved, launches = graph_bytes(graph, inputs)

        def run(*arguments: Any) -> Any:
            self.counter.add(moved, launches)
            with _disable_current_modes():
                return graph(*arguments)

        return make_boxed_func(run)

    def backend(self) -> Callable[..., Any]:
        """What torch.compile is given: Inductor's decompositions and its partition of graphs."""
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        return aot_autograd(
            fw_compiler=self,
            bw_compiler=self,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )


def graph_bytes(graph: torch.fx.GraphModule, inputs: list[Any]) -> tuple[int, int]:
    """Lower a graph as Inductor does, for a CPU and without data: bytes and kernels."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    graph.recompile()
    mode = torch._guards.detect_fake_mode(inputs)
    with mode:
        fakes = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
            if isinstance(each, torch.Tensor)
            else each
            for each in inputs
        ]
    with V.set_fake_mode(fake_tensor_prop(graph, fakes, True)), DebugContext():
        _recursive_post_grad_passes(graph, False)
        lowering = GraphLowering(graph)
        with V.set_graph_handler(lowering), V.set_real_inputs(fakes):
            lowering.run(*fakes)
            lowering._update_scheduler()
            return lowering.count_bytes()[0], len(lowering.scheduler.nodes)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=dtype.is_floating_point)


def our_traffic(backend: str, *, compiles: bool = False, dropout: float = 0.0) -> Traffic:
    """Count our layer, forward and backward."""
    network = NetworkSection(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    words = {"attention_backend": backend, "compile": "layer" if compiles else "none"}
    model = ModelSection().model_copy(update=words)
    with META:
        layer = EncoderLayer(network, model).bfloat16()
    relative = relative_positions(LENGTH, network.position_buckets, 512, META)
    key = DropoutKey(_meta(2, dtype=torch.int64)) if dropout else None
    context = LayerContext(relative, _meta(TABLE_ROWS, WIDTH), None, key)
    states = _meta(SEQUENCES, LENGTH, WIDTH)
    counter = TrafficCounter()
    with pytest.MonkeyPatch.context() as patch:
        if compiles:
            compiled_module.compiled.cache_clear()
            patch.setattr(compiled_module, "BACKEND", GraphCounter(counter).backend())
            layer(states, context, 0).sum().backward()  # what compiling does is not the layer's
            counter.bytes = counter.launches = 0
        with counter:
            layer(states, context, 0).sum().backward()
    compiled_module.compiled.cache_clear()
    if backend == "triton":
        inside, steps = hidden_traffic()
        counter.add(inside, steps - OUR_OPERATORS)
    return counter.traffic


def transformers_traffic(dropout: float = 0.0) -> Traffic:
    """Count transformers' layer, forward and backward."""
    config = DebertaV2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        relative_attention=True,
        position_buckets=256,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with META:
        layer = DebertaV2Layer(config).bfloat16().train()
        pairs = torch.zeros(1, LENGTH, LENGTH, dtype=torch.int64)
        mask = torch.ones(SEQUENCES, 1, LENGTH, LENGTH)
    with TrafficCounter() as counter:
        states, table = _meta(SEQUENCES, LENGTH, WIDTH), _meta(TABLE_ROWS, WIDTH)
        layer(states, mask, relative_pos=pairs, rel_embeddings=table)[0].sum().backward()
    return counter.traffic


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step a token of 16 x 512, without dropout."""

    counted: float
    """By torch, of the `eager` backend, which has no more columns than the formula."""
    recomputed: float
    """The vocabulary head's logits, which its backward pass computes again."""
    tables: float
    """Projections of the relative table, once a layer and micro batch: nothing for a large one."""
    formula: float
    """`pipeline.flops`, the minimal algorithm."""

    @property
    def minimal(self) -> float:
        """What was counted, without what the formula leaves out on purpose."""
        return self.counted - self.recomputed - self.tables


def step_flops() -> StepFlops:
    """Count both networks of large, forward and backward, on meta tensors."""
    config = load_run_config("deberta_v3_large", ["model.attention_backend=eager"])
    with META:
        pair = NetworkPair(config).bfloat16()
    slots_a_row = num_masked_slots(LENGTH, config.objective)
    ids, slots, words = (
        _meta(SEQUENCES, columns, dtype=torch.int64) for columns in (LENGTH, slots_a_row, 2)
    )
    with FlopCounterMode(display=False) as counter:
        arguments = (ids, None, slots, slots > 0, slots, DrawKey((1, 2), words), None)
        out = pair.generator(*arguments)
        out.loss_sum.backward()
        inputs = corrupt(ids, slots, slots > 0, out.drawn_BK)
        rows = shared_rows(pair.generator, pair.discriminator, inputs.input_ids_BL)
        labels = inputs.is_replaced_BL.float()
        rtd = pair.discriminator(inputs.input_ids_BL, rows, None, labels, None)
        rtd.loss_sum.backward()
    tokens, layers = SEQUENCES * LENGTH, 12 + 24
    return StepFlops(
        counted=counter.get_total_flops() / tokens,
        recomputed=slots_a_row / LENGTH * 2 * WIDTH * config.model.vocab_size,
        tables=3 * layers * 2 * (2 * TABLE_ROWS * WIDTH**2) / tokens,
        formula=training_flops_per_token(config),
    )
