"""What a self-check found, and how people, scripts and errors are told.

A `Finding` is one check's worst error and its place; a `SelfCheck` is those of one model, with the verdict on running
prompts in pieces. This module knows how to tell them; it refuses to know how they are measured, and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lccp_interp.schema import LccpError


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        passed: whether it holds.
        error: the worst error found, or the least change where `at_least` is set; NaN if it is no number.
        limit: what `error` may be at most, or must be at least.
        layer: true index of the worst layer; None where the check is about no layer.
        head: the worst head of that layer; None where the check is about no head.
        text: what was compared and, after a failure, what to do.
        at_least: whether `limit` is a lower one.
    """

    name: str
    passed: bool
    error: float
    limit: float
    layer: int | None
    head: int | None
    text: str
    at_least: bool = False

    @property
    def where(self) -> str:
        """Place of the worst error, e.g. `layer 3, head 5`; empty where there is none."""
        places = (("layer", self.layer), ("head", self.head))
        return ", ".join(f"{name} {index}" for name, index in places if index is not None)


@dataclass(frozen=True)
class SelfCheck:
    """What the self-check of one loaded model found.

    Attributes:
        checkpoint: its name.
        dtype: of its weights, e.g. `float32`.
        kernel: attention implementation under the tap, e.g. `sdpa`.
        n_layers: decoder layers, with or without attention.
        attention_layers: true indices of the layers whose rows can be captured.
        findings: one per check; a check that can say nothing after an earlier failure is left out.
        shares_prefixes: whether a prompt may be run in pieces behind a cache that is cropped and used again.
        sharing: why it may or may not.
    """

    checkpoint: str
    dtype: str
    kernel: str
    n_layers: int
    attention_layers: tuple[int, ...]
    findings: tuple[Finding, ...]
    shares_prefixes: bool
    sharing: str

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(finding.passed for finding in self.findings)

    def require(self) -> SelfCheck:
        """Itself, if every check holds.

        Raises:
            LccpError: naming the checkpoint, the check, layer, head, error, limit and what to do.
        """
        for finding in self.findings:
            if not finding.passed:
                at = f" at {finding.where}" if finding.where else ""
                asked = f"{'at least' if finding.at_least else 'limit'} {finding.limit:.2g}"
                raise LccpError(
                    f"checkpoint {self.checkpoint} fails its self-check ({finding.name}){at}: {finding.text} "
                    f"[error {finding.error:.2g}, {asked}; {self.dtype}, {self.kernel}]"
                )
        return self

    def as_record(self) -> dict[str, Any]:
        """A JSON object of it all; an error that is no number is None."""
        findings = []
        for finding in self.findings:
            record = asdict(finding)
            findings.append({**record, "error": finding.error if math.isfinite(finding.error) else None})
        return {
            "checkpoint": self.checkpoint,
            "passed": self.passed,
            "dtype": self.dtype,
            "kernel": self.kernel,
            "n_layers": self.n_layers,
            "attention_layers": list(self.attention_layers),
            "shares_prefixes": self.shares_prefixes,
            "sharing": self.sharing,
            "findings": findings,
        }

    def rows(self) -> list[dict[str, str]]:
        """One line per check for a table that people read, numbers rounded."""
        return [
            {
                "check": finding.name,
                "worst": f"{finding.error:.1e}" if finding.error else "0",
                "limit": ("> " if finding.at_least else "") + (f"{finding.limit:.1e}" if finding.limit else "0"),
                "where": finding.where,
                "verdict": "ok" if finding.passed else "FAILED",
            }
            for finding in self.findings
        ]

    def summary(self) -> str:
        """The verdict in one line, to stand above the table.

        Example:
            >>> SelfCheck("step-9", "float32", "sdpa", 4, (1, 3), (), False, "layers carry a state").summary()
            'step-9: passed (float32 over sdpa, attention in 2 of 4 layers)'
        """
        n_failed = sum(not finding.passed for finding in self.findings)
        verdict = f"{n_failed} of {len(self.findings)} checks FAILED" if n_failed else "passed"
        n_layers = max(self.n_layers, len(self.attention_layers))  # one block may hold two attentions
        return (
            f"{self.checkpoint}: {verdict} ({self.dtype} over {self.kernel}, attention in "
            f"{len(self.attention_layers)} of {n_layers} layers)"
        )


def finding_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record of `lccp check` as flat rows, one per finding; a model that could not be checked has one that says why.

    Args:
        record: `SelfCheck.as_record()`, or `checkpoint` and `error` alone.

    Example:
        >>> (row,) = finding_rows({"checkpoint": "step-9", "error": "no weights"})
        >>> row["check"], row["passed"], row["text"]
        ('load', False, 'no weights')
    """
    unchecked = dict.fromkeys(finding.name for finding in fields(Finding)) | {"name": "load", "passed": False}
    findings = record.get("findings") or [unchecked | {"text": record["error"]}]
    return [
        {"checkpoint": record["checkpoint"], "dtype": record.get("dtype"), "kernel": record.get("kernel")}
        | {"check" if key == "name" else key: value for key, value in finding.items() if key != "at_least"}
        for finding in findings
    ]
