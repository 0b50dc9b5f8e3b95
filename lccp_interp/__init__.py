"""lccp_interp: retrieval heads across the checkpoints of long-context continual pre-training.

The public names, in the order of the flow: checkpoints -> tasks -> capture -> scoring -> store -> dynamics -> figures
and report. Importing the package imports none of the stages; a name is fetched when it is first used, so that reading
tables needs no torch.

Example:
    >>> import lccp_interp
    >>> lccp_interp.Span(2, 5)
    Span(start=2, end=5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "LccpError": "schema",
    "Needle": "schema",
    "Span": "schema",
    "Case": "schema",
    "Item": "schema",
    "Checkpoint": "schema",
    "find_checkpoints": "checkpoints",
    "bundled_trajectory": "checkpoints",
    "NiahGrid": "tasks.niah",
    "build_cases": "tasks.niah",
    "InterferenceGrid": "tasks.interference",
    "LongBioGrid": "tasks.longbio",
    "PromptWriter": "tasks.items",
    "read_needles": "tasks.niah",
    "read_haystack": "tasks.haystack",
    "HookedModel": "capture.model",
    "load_model": "capture.model",
    "Prefill": "capture.prefill",
    "self_check": "capture.selfcheck",
    "METRICS": "scoring.metrics",
    "HeadMetric": "scoring.metrics",
    "register_metric": "scoring.metrics",
    "AttentionRows": "scoring.metrics",
    "score_cases": "scoring.engine",
    "score_generated": "scoring.generate",
    "head_types": "scoring.types",
    "plan_study": "plan",
    "score": "sweep",
    "score_grid": "sweep",
    "Run": "store",
    "ablate_heads": "interventions.causal",
    "zero_heads": "interventions.hooks",
    "scale_heads": "interventions.hooks",
    "replace_heads": "interventions.hooks",
    "patch_heads": "interventions.hooks",
    "mask_span": "interventions.hooks",
    "head_outputs": "interventions.hooks",
    "mean_outputs": "interventions.hooks",
    "patch_paths": "interventions.paths",
    "trace_circuit": "interventions.tracing",
    "head_graph": "interventions.circuits",
    "logit_contributions": "interventions.circuits",
    "copying_scores": "interventions.weights",
    "matching_scores": "interventions.weights",
    "HeadGraph": "interventions.graph",
    "fine_tune": "behaviour.sft",
    "answer_items": "behaviour.evaluate",
    "ProbeStudy": "behaviour.probe",
    "probe": "behaviour.probe",
    "probe_corpora": "behaviour.corpora",
    "probe_with_lm_eval": "behaviour.harness",
    "read_heads": "imports",
    "import_heads": "imports",
    "import_probes": "imports",
    "score_table": "dynamics",
    "head_records": "dynamics",
    "census": "dynamics",
    "lives": "dynamics",
    "stability": "dynamics",
    "outcome_table": "dynamics",
    "interference_table": "dynamics",
    "paired_heads": "dynamics",
    "compare": "dynamics",
    "survival": "dynamics",
    "by_kv_head": "dynamics",
    "metric_agreement": "dynamics",
    "saturation_table": "dynamics",
    "deceptive_saturation": "dynamics",
    "causal_table": "dynamics",
    "important_from": "dynamics",
    "correlate": "dynamics",
    "budget": "dynamics",
    "draw_figures": "figures",
    "HeadExplorer": "figures.explorer",
    "write_report": "report",
    "read_study": "study",
    "check_study": "study",
    "run_study": "study",
    "run_status": "study",
    "RetrievalHeadMonitor": "monitor.callback",
    "HeadObserver": "monitor.observe",
    "watch": "monitor.watch",
}

if TYPE_CHECKING:
    from lccp_interp.behaviour.corpora import probe_corpora as probe_corpora
    from lccp_interp.behaviour.evaluate import answer_items as answer_items
    from lccp_interp.behaviour.harness import probe_with_lm_eval as probe_with_lm_eval
    from lccp_interp.behaviour.probe import ProbeStudy as ProbeStudy
    from lccp_interp.behaviour.probe import probe as probe
    from lccp_interp.behaviour.sft import fine_tune as fine_tune
    from lccp_interp.capture.model import HookedModel as HookedModel
    from lccp_interp.capture.model import load_model as load_model
    from lccp_interp.capture.prefill import Prefill as Prefill
    from lccp_interp.capture.selfcheck import self_check as self_check
    from lccp_interp.checkpoints import bundled_trajectory as bundled_trajectory
    from lccp_interp.checkpoints import find_checkpoints as find_checkpoints
    from lccp_interp.dynamics import budget as budget
    from lccp_interp.dynamics import by_kv_head as by_kv_head
    from lccp_interp.dynamics import causal_table as causal_table
    from lccp_interp.dynamics import census as census
    from lccp_interp.dynamics import compare as compare
    from lccp_interp.dynamics import correlate as correlate
    from lccp_interp.dynamics import deceptive_saturation as deceptive_saturation
    from lccp_interp.dynamics import head_records as head_records
    from lccp_interp.dynamics import important_from as important_from
    from lccp_interp.dynamics import interference_table as interference_table
    from lccp_interp.dynamics import lives as lives
    from lccp_interp.dynamics import metric_agreement as metric_agreement
    from lccp_interp.dynamics import outcome_table as outcome_table
    from lccp_interp.dynamics import paired_heads as paired_heads
    from lccp_interp.dynamics import saturation_table as saturation_table
    from lccp_interp.dynamics import score_table as score_table
    from lccp_interp.dynamics import stability as stability
    from lccp_interp.dynamics import survival as survival
    from lccp_interp.figures import draw_figures as draw_figures
    from lccp_interp.figures.explorer import HeadExplorer as HeadExplorer
    from lccp_interp.imports import import_heads as import_heads
    from lccp_interp.imports import import_probes as import_probes
    from lccp_interp.imports import read_heads as read_heads
    from lccp_interp.interventions.causal import ablate_heads as ablate_heads
    from lccp_interp.interventions.circuits import head_graph as head_graph
    from lccp_interp.interventions.circuits import logit_contributions as logit_contributions
    from lccp_interp.interventions.graph import HeadGraph as HeadGraph
    from lccp_interp.interventions.hooks import head_outputs as head_outputs
    from lccp_interp.interventions.hooks import mask_span as mask_span
    from lccp_interp.interventions.hooks import mean_outputs as mean_outputs
    from lccp_interp.interventions.hooks import patch_heads as patch_heads
    from lccp_interp.interventions.hooks import replace_heads as replace_heads
    from lccp_interp.interventions.hooks import scale_heads as scale_heads
    from lccp_interp.interventions.hooks import zero_heads as zero_heads
    from lccp_interp.interventions.paths import patch_paths as patch_paths
    from lccp_interp.interventions.tracing import trace_circuit as trace_circuit
    from lccp_interp.interventions.weights import copying_scores as copying_scores
    from lccp_interp.interventions.weights import matching_scores as matching_scores
    from lccp_interp.monitor.callback import RetrievalHeadMonitor as RetrievalHeadMonitor
    from lccp_interp.monitor.observe import HeadObserver as HeadObserver
    from lccp_interp.monitor.watch import watch as watch
    from lccp_interp.plan import plan_study as plan_study
    from lccp_interp.report import write_report as write_report
    from lccp_interp.schema import Case as Case
    from lccp_interp.schema import Checkpoint as Checkpoint
    from lccp_interp.schema import Item as Item
    from lccp_interp.schema import LccpError as LccpError
    from lccp_interp.schema import Needle as Needle
    from lccp_interp.schema import Span as Span
    from lccp_interp.scoring.engine import score_cases as score_cases
    from lccp_interp.scoring.generate import score_generated as score_generated
    from lccp_interp.scoring.metrics import METRICS as METRICS
    from lccp_interp.scoring.metrics import AttentionRows as AttentionRows
    from lccp_interp.scoring.metrics import HeadMetric as HeadMetric
    from lccp_interp.scoring.metrics import register_metric as register_metric
    from lccp_interp.scoring.types import head_types as head_types
    from lccp_interp.store import Run as Run
    from lccp_interp.study import check_study as check_study
    from lccp_interp.study import read_study as read_study
    from lccp_interp.study import run_status as run_status
    from lccp_interp.study import run_study as run_study
    from lccp_interp.sweep import score as score
    from lccp_interp.sweep import score_grid as score_grid
    from lccp_interp.tasks.haystack import read_haystack as read_haystack
    from lccp_interp.tasks.interference import InterferenceGrid as InterferenceGrid
    from lccp_interp.tasks.items import PromptWriter as PromptWriter
    from lccp_interp.tasks.longbio import LongBioGrid as LongBioGrid
    from lccp_interp.tasks.niah import NiahGrid as NiahGrid
    from lccp_interp.tasks.niah import build_cases as build_cases
    from lccp_interp.tasks.niah import read_needles as read_needles

__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lccp_interp' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"lccp_interp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
