"""Outside data in: head scores that others published, and benchmark results that were measured elsewhere.

`heads` reads head lists and keeps them in a run under `imported/`; `probes` reads benchmark results, those of
evaluation harnesses with `harness`, matches their checkpoints with the run's and adds them to `probes/`. Both leave
their file's name, hash and date in run.json under `imports`. `kinds` tells what a file is. A file that is not what it
should be is refused with the line or key that is wrong.

The package knows files and tables; it refuses to know models and statistics over time, and imports no torch.
"""

from lccp_interp.imports.files import records as records
from lccp_interp.imports.harness import HARNESS_READERS as HARNESS_READERS
from lccp_interp.imports.harness import Results as Results
from lccp_interp.imports.harness import name_some as name_some
from lccp_interp.imports.heads import HEAD_KINDS as HEAD_KINDS
from lccp_interp.imports.heads import HEADS_SCHEMA as HEADS_SCHEMA
from lccp_interp.imports.heads import import_heads as import_heads
from lccp_interp.imports.heads import imported_heads as imported_heads
from lccp_interp.imports.heads import imported_names as imported_names
from lccp_interp.imports.heads import list_shape as list_shape
from lccp_interp.imports.heads import read_heads as read_heads
from lccp_interp.imports.heads import summarise_heads as summarise_heads
from lccp_interp.imports.heads import top_heads as top_heads
from lccp_interp.imports.kinds import AUTO as AUTO
from lccp_interp.imports.kinds import KINDS as KINDS
from lccp_interp.imports.kinds import guess_kind as guess_kind
from lccp_interp.imports.probes import PLAIN_KINDS as PLAIN_KINDS
from lccp_interp.imports.probes import PROBE_KINDS as PROBE_KINDS
from lccp_interp.imports.probes import add_results as add_results
from lccp_interp.imports.probes import import_probes as import_probes
from lccp_interp.imports.probes import match_checkpoints as match_checkpoints
from lccp_interp.imports.probes import read_probes as read_probes
from lccp_interp.imports.probes import read_results as read_results
