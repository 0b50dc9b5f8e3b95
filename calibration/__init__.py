"""How often the statistics of this project are wrong, measured on made-up data whose truth is known.

`python -m calibration` (or `make calibrate`) runs every part that `run.PARTS` names, keeps the records in
`results.json` and writes them as `docs/calibration.md`. A part is a module here with

    TITLE               heading on the page
    measure(say, quick) records, plain JSON values; `say` is told what is going on, `quick` means few repetitions
    table(records)      the records as lines of Markdown
    failures(records)   one line for every bound that does not hold; none is what the slow tests ask for

To add one, put the module here and its name into `run.PARTS`. Everything is seeded: the same versions give the same
records. This package is no part of `lccp_interp` and nothing there imports it.
"""
