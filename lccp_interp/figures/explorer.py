"""The head explorer: a widget for Jupyter to look at every head of a run, over checkpoints, and at what it attends to.

    from lccp_interp.figures.explorer import HeadExplorer
    explorer = HeadExplorer(Run.open("runs/demo"), length=1024, model=load_model("data/trajectory/18-lccp-2.62M"))
    explorer                      # click a head, move the slider, choose a case
    explorer.selection            # what is selected, for the next cell

Scores are sent to the browser once; only attention is asked of Python, when a case is chosen. The widget loads nothing
from anywhere, and writes all text as text. Importing this module needs anywidget; exploring without a model needs no
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures import style
from lccp_interp.figures.explorer_attention import AttentionReader, head_rows, read_text
from lccp_interp.figures.explorer_scores import STATISTICS, HeadArrays, case_labels
from lccp_interp.schema import LccpError
from lccp_interp.store import Run, cases_from_frame

try:
    import anywidget
    import traitlets
except ImportError as missing:
    raise LccpError(
        f"the head explorer needs anywidget, which is not installed ({missing}); pip install lccp_interp[widgets]"
    ) from missing

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.schema import Case

DARK_SCORES = ("#0b1526", *reversed(style.SCORES))
"""The scale of scores on a dark page: low is dark there, too."""

MEAN = -1
"""As `event`: the mean over all copy events."""

HERE = Path(__file__).parent


class UnknownChoice(LccpError, traitlets.TraitError):
    """A trait was set to what the run does not have; as a TraitError it makes traitlets take back a set of changes."""


class HeadExplorer(anywidget.AnyWidget):
    """Scores of all heads as a map with a slider over checkpoints; one head's trajectory and attention.

    Sent once: 16 bytes per metric, checkpoint and head, and 1 more per checkpoint and head; 32 x 32 heads at 20
    checkpoints under 4 metrics make 1.3 MB.

    A retrieval head (framed) is one by the metric `retrieval` whatever metric is shown, or by the metric asked for in a
    run without it; so are births and deaths.

    Args:
        run: an opened run, or its tables.
        length: context length at which heads are read, in tokens; None means the longest of the run.
        metric: the one shown first.
        model: a loaded checkpoint of this run, for attention; it is shown whatever the slider says.
        checkpoints: instead of `model`, the folder with the run's checkpoints: attention follows the slider. One is in
            memory at a time.

    Attributes:
        layer, head, checkpoint, metric, case_id: what is selected; set them, or read what was clicked. `case_id` is
            empty while no case is chosen.
        event: which copy event's attention is shown, from 0; -1 means the mean over all.

    Raises:
        LccpError: an unknown metric, length, layer, head, checkpoint or case (the known ones are listed), both `model`
            and `checkpoints`, or nothing scored.

    Example:
        >>> explorer = HeadExplorer(Run.open("runs/demo"))      # doctest: +SKIP
        >>> explorer.layer, explorer.head = 3, 6                # doctest: +SKIP
        >>> explorer.selection["score"]                         # doctest: +SKIP
        0.98
    """

    _esm = (HERE / "explorer.js").read_text(encoding="utf-8")
    _css = (HERE / "explorer.css").read_text(encoding="utf-8")

    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int().tag(sync=True)
    checkpoint = traitlets.Unicode().tag(sync=True)
    metric = traitlets.Unicode().tag(sync=True)
    case_id = traitlets.Unicode().tag(sync=True)
    event = traitlets.Int(MEAN).tag(sync=True)
    _about = traitlets.Dict().tag(sync=True)
    _scores = traitlets.Bytes().tag(sync=True)
    _attention = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: Run | RunTables,
        *,
        length: int | None = None,
        metric: str = "retrieval",
        model: HookedModel | None = None,
        checkpoints: str | Path | None = None,
    ) -> None:
        tables = RunTables.of(run, length=length)
        self._reader = AttentionReader(model, checkpoints)
        self._chosen: Case | None = None
        self._arrays = arrays = HeadArrays.of(tables, metric)
        self._tables = arrays.tables
        cases = case_labels(self._tables)
        self._case_ids = [case_id for case_id, _ in cases]
        about = arrays.describe()
        about |= {
            "cases": cases,
            "colours": {"light": list(style.SCORES), "dark": list(DARK_SCORES)},
            "attention": self._reader.source,
            "model_name": self._reader.model_name,
        }
        layer, head = arrays.strongest(metric, arrays.names[-1])
        super().__init__(
            layer=layer, head=head, checkpoint=arrays.names[-1], metric=metric, _about=about, _scores=arrays.packed
        )

    @property
    def selection(self) -> dict[str, Any]:
        """What is selected, with its numbers: layer, head, checkpoint, metric, case_id, score, ci_low, ci_high, n,
        retrieval_head. Scores are NaN where undefined; `case_id` is None while no case is chosen."""
        arrays = self._arrays
        at = (arrays.names.index(self.checkpoint), arrays.layers.index(self.layer), arrays.heads.index(self.head))
        numbers = arrays.values[(slice(None), arrays.metrics.index(self.metric), *at)]
        return {
            "layer": self.layer,
            "head": self.head,
            "checkpoint": self.checkpoint,
            "metric": self.metric,
            "case_id": self.case_id or None,
            **{name: round(float(value), 6) for name, value in zip(STATISTICS, numbers, strict=True)},
            "n": int(numbers[STATISTICS.index("n")]) if numbers[STATISTICS.index("n")] > 0 else 0,
            "retrieval_head": bool(arrays.retrieves[at]),
        }

    @traitlets.validate("layer", "head")
    def _known_place(self, proposal: Any) -> int:
        name = proposal["trait"].name
        known = self._arrays.layers if name == "layer" else self._arrays.heads
        value = int(proposal["value"])
        if value not in known:
            raise UnknownChoice(
                f"{name} {value} is not in {self._tables.run.path}; it has {', '.join(map(str, known))}"
            )
        return value

    @traitlets.validate("checkpoint", "metric")
    def _known_name(self, proposal: Any) -> str:
        name = proposal["trait"].name
        known = self._arrays.names if name == "checkpoint" else self._arrays.metrics
        try:
            return choose(name, proposal["value"], known, str(self._tables.run.path))
        except LccpError as error:
            raise UnknownChoice(str(error)) from None

    @traitlets.validate("case_id")
    def _known_case(self, proposal: Any) -> str:
        value = str(proposal["value"])
        if value and value not in self._case_ids:
            raise UnknownChoice(
                f"no case {value!r} of {self._tables.head_length} tokens in {self._tables.run.path}; its "
                f"{len(self._case_ids)} cases are {', '.join(self._case_ids[:3])}, ..."
            )
        return value

    @traitlets.validate("event")
    def _known_event(self, proposal: Any) -> int:
        return max(MEAN, int(proposal["value"]))

    @traitlets.observe("layer", "head", "checkpoint", "case_id", "event")
    def _attend(self, change: Any) -> None:
        """Put the attention of what is selected where the browser sees it, or why there is none."""
        if not self.case_id or self._reader.source == "none":
            self._attention = {}
            return
        key = [self.case_id, self.layer, self.head, self.event]
        key += [self.checkpoint] if self._reader.source == "folder" else []
        if self._attention.get("key") == key:
            return
        try:
            case = self._case(self.case_id)
            rows = head_rows(self._reader.rows(self.checkpoint, case, self.layer), self.head, self._reader.model_name)
            event = self.event if self.event < len(rows) else MEAN
            found = read_text(rows, case, self._reader.tokenizer, event) | {"event": event}
        except LccpError as error:
            found = {"problem": str(error)}
        except Exception as error:  # a callback's error would vanish in a log, and the page wait for ever
            found = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        self._attention = {"key": key, "model": self._reader.model_name, **found}

    def _case(self, case_id: str) -> Case:
        if self._chosen is None or self._chosen.case_id != case_id:
            self._chosen = cases_from_frame(self._tables.run.cases.filter(pl.col("case_id") == case_id))[0]
        return self._chosen
