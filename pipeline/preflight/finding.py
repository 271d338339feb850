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
    def line(self) -> str:
        """The finding as `NODE CHECK: ok, ...` or `NODE CHECK: FAIL, ...; CURE`."""
        if self.ok:
            return f"{self.node} {self.check}: ok, {self.text}"
        return f"{self.node} {self.check}: FAIL, {self.text}; {self.cure}"
