"""How often stage 3 gathers each weight in a micro step: DeepSpeed's bookkeeping, gone through.

From its second micro step on DeepSpeed knows in which order modules are used, forward and backward.
Before a module it gathers what is missing, then weights that are needed soon, as many as
stage3_prefetch_bucket_size and stage3_max_live_parameters allow. Behind it a weight is dropped,
unless it was marked for a later use while looking ahead, or is used again within
stage3_max_reuse_distance elements of modules.

    _Module    one use of a module, and the uses inside of it: the networks of `pipeline.modeling`
    _Trace     one micro step through them

What activation checkpointing computes again is not gone through: with it, and with weights that do
not stay, more is gathered than is counted here.

Source: DeepSpeed 0.19.8, `runtime/zero/partitioned_param_coordinator.py` (fetch_sub_module,
release_sub_module, __params_to_release). Parameters are indices into those of their engine.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

from pipeline.config import RunConfig
from pipeline.plan.parameters import EngineParameters, Parameter, network_parameters
from pipeline.plan.sharding import Sharding


@dataclass(frozen=True)
class _Module:
    own: tuple[int, ...] = ()
    inside: tuple["_Module", ...] = ()

    def uses(self, backward: bool) -> Iterator[tuple["_Module", bool]]:
        """Modules as they begin (True) and end (False) in a pass; what is around begins first."""
        yield self, True
        for module in reversed(self.inside) if backward else self.inside:
            yield from module.uses(backward)
        yield self, False


@dataclass(frozen=True)
class _Network:
    """What decides in which order the modules of a network are used."""

    is_generator: bool
    layers: int
    is_relative: bool
    has_decoder: bool
    """The enhanced mask decoder: the last layer twice, with keys and values from outside."""


class _Builder:
    """Makes the uses of a network's modules from the names of its parameters."""

    def __init__(self, parameters: Sequence[Parameter], first: int) -> None:
        self._own: dict[str, list[int]] = {}
        for number, parameter in enumerate(parameters, first):
            self._own.setdefault(parameter.name.rpartition(".")[0], []).append(number)

    def network(self, network: _Network) -> _Module:
        """One forward pass."""
        tables, encoder, last = "deberta.embeddings", "deberta.encoder", network.layers - 1
        positions = self._of(f"{tables}.position_embeddings")
        inputs = [*self._of(f"{tables}.word_embeddings")]
        inputs += [] if network.has_decoder else positions
        inputs += self._of(f"{tables}.embed_proj", f"{tables}.LayerNorm")
        body = [*positions] if network.has_decoder else []
        body += self._of(f"{encoder}.rel_embeddings", f"{encoder}.LayerNorm")
        for number in range(network.layers):
            decodes = network.has_decoder and number == last
            body += self._layer(f"{encoder}.layer.{number}", network.is_relative, decodes)
            if number == 0:
                body += self._of(f"{encoder}.conv.conv", f"{encoder}.conv.LayerNorm")
        if network.is_generator:
            head = "lm_predictions.lm_head"
            tied = (*self._own[head], *self._own[f"{tables}.word_embeddings"])
            predicted = _Module(tied, self._of(f"{head}.dense", f"{head}.LayerNorm"))
        else:
            parts = [f"mask_predictions.{part}" for part in ("LayerNorm", "dense", "classifier")]
            body, predicted = [_Module((), tuple(body))], _Module((), self._of(*parts))
        return _Module((), (_Module((), tuple(inputs)), *body, predicted))

    def _layer(self, layer: str, is_relative: bool, decodes: bool) -> tuple[_Module, ...]:
        attention, output = f"{layer}.attention", f"{layer}.output"
        query, key, value = (
            self._of(f"{attention}.self.{kind}_proj") for kind in ("query", "key", "value")
        )
        # Distances go through the same projections.
        distances = (*key, *query) if is_relative else ()
        rest = (
            _Module((), query),
            _Module((), self._of(f"{attention}.output.dense", f"{attention}.output.LayerNorm")),
            _Module((), self._of(f"{layer}.intermediate.dense")),
            _Module((), self._of(f"{output}.dense", f"{output}.LayerNorm")),
        )
        if decodes:
            return (*key, *value, *(*distances, _Module((), rest)) * 2)
        return (_Module((), (*key, *value, *distances, *rest)),)

    def _of(self, *names: str) -> tuple[_Module, ...]:
        """A use of each of the modules of these names that there is."""
        return tuple(_Module(tuple(self._own[name])) for name in names if name in self._own)


@dataclass(frozen=True)
class _Limits:
    """Elements, from the DeepSpeed JSON."""

    live: int
    reuse_distance: int
    prefetch: int


@dataclass
class _Trace:
    """What DeepSpeed remembers within a micro step."""

    sizes: Sequence[int]
    uses: list[_Module]
    kept: frozenset[int]
    limits: _Limits
    gathered: Counter[int] = field(default_factory=Counter)
    step: int = 0

    def __post_init__(self) -> None:
        self._present, self._active = set(self.kept), Counter[int]()
        self._available = 0
        self._marked: dict[int, int] = {}
        self._queue = deque((each, at) for at, use in enumerate(self.uses) for each in use.own)

    def begin(self, module: _Module) -> None:
        """Gather what the module needs, and some of what comes next."""
        self._gather(module.own)
        self._active.update(module.own)
        new = {each for each in module.own if self._marked.get(each, -1) < self.step}
        while new:
            each, at = self._queue.popleft()
            self._marked[each] = at
            new.discard(each)
        allowed = self.limits.live - self._available
        room, soon = min(allowed, self.limits.prefetch), dict[int, None]()
        while self._queue and sum(self.sizes[each] for each in soon) < room:
            each, at = self._queue.popleft()
            self._marked[each] = max(self._marked.get(each, -1), at)
            if each not in self._present:
                soon[each] = None
        self._gather(soon)
        self.step += 1

    def end(self, module: _Module) -> None:
        """Drop what the module needed, but for what is soon used again."""
        dropped = {each for each in module.own if self._marked[each] <= self.step} - self.kept
        traversed, at = 0, self.step
        while dropped and at < len(self.uses) and traversed < self.limits.reuse_distance:
            dropped.difference_update(self.uses[at].own)
            traversed += sum(self.sizes[each] for each in self.uses[at].own)
            at += 1
        self._active.subtract(module.own)
        for each in dropped & self._present:
            if not self._active[each]:
                self._present.remove(each)
                self._available -= self.sizes[each]

    def _gather(self, wanted: Sequence[int] | dict[int, None]) -> None:
        for each in wanted:
            if each not in self._present:
                self._present.add(each)
                self.gathered[each] += 1
                self._available += self.sizes[each]


def gathered_times(
    config: RunConfig, sharding: Sharding, engine: EngineParameters, name: str
) -> list[int]:
    """Count how often a micro step gathers each parameter.

    Args:
        config: The run.
        sharding: Stage 3, and what it keeps whole.
        engine: The engine's parameters.
        name: Its name.

    Returns:
        For each of `engine.ordered`: 0 for what stays whole, 1 for what is kept from the forward to
        the backward pass.
    """
    zero = sharding.config.settings.zero_optimization
    kept = {id(each) for each in sharding.persistent(engine)}
    names = list(config.networks) if name == "joint" else [name]
    networks = tuple(
        (
            _Network(
                each == "generator",
                config.networks[each].num_hidden_layers,
                config.networks[each].relative_attention,
                each == "generator" and config.objective.enhanced_mask_decoder,
            ),
            len(network_parameters(config)[each]),
        )
        for each in names
    )
    return _times(
        networks,
        engine.ordered,
        frozenset(n for n, each in enumerate(engine.ordered) if id(each) in kept),
        _Limits(
            zero.stage3_max_live_parameters,
            zero.stage3_max_reuse_distance,
            zero.stage3_prefetch_bucket_size,
        ),
    )


@lru_cache(maxsize=64)
def _times(
    networks: tuple[tuple[_Network, int], ...],
    parameters: tuple[Parameter, ...],
    kept: frozenset[int],
    limits: _Limits,
) -> list[int]:
    ends = accumulate((count for _, count in networks), initial=0)
    passes = [
        _Builder(parameters[first:end], first).network(network)
        for (network, _), (first, end) in zip(networks, pairwise(ends), strict=True)
    ]
    root = passes[0] if len(passes) == 1 else _Module((), tuple(passes))
    events = [*root.uses(backward=False), *root.uses(backward=True)]
    uses = [module for module, begins in events if begins]
    trace = _Trace([each.elements for each in parameters], uses, kept, limits)
    for module, begins in events:
        (trace.begin if begins else trace.end)(module)
    return [trace.gathered[number] for number in range(len(parameters))]
