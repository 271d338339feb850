"""What one look at a node has shown."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    node: str
    """Whose it is: the node that a failure speaks of, not the one that noticed it."""
    check: str
    """What was looked at, such as "gpu 0" or "disk runs/large"."""
    ok: bool
    text: str
    """What was seen."""
    cure: str = ""
    """What helps; empty where all is well."""

    @property
    def is_warning(self) -> bool:
        """Whether training runs, and something would still be better: ok, with a cure."""
        return self.ok and bool(self.cure)

    @property
    def line(self) -> str:
        """The finding as `NODE CHECK: ok, ...`, or `warning, ...; CURE`, or `FAIL, ...; CURE`."""
        start = f"{self.node} {self.check}"
        if self.ok and not self.cure:
            return f"{start}: ok, {self.text}"
        return f"{start}: {'warning' if self.ok else 'FAIL'}, {self.text}; {self.cure}"
