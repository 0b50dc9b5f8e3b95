"""The study file that `lccp init` writes: every key with what it means, ready to run on the bundled trajectory.

It is kept as a text, so that its comments are what a person reads; a test reads it as a study. It costs nothing.
"""

TEMPLATE = """\
# A study: which checkpoints are asked what, and how the work is done. Run it with `lccp run FILE`, as often as you
# like: what is done stays, what is missing is done. Relative paths begin at the folder of this file.
# Tokens are written like 4096, 16K (16000), 1.2M or 20B.

out: runs/study                 # the run folder

checkpoints:
  sources: [bundled]            # folders of checkpoints, patterns like ckpts/step-*, a hub repository with revisions
                                # like EleutherAI/pythia-160m@step*; `bundled` is the trajectory that ships with lccp
  # tokens: {step-100: 1.2B}    # tokens seen by name, or a CSV file (name,tokens); wins over names and trainer states
  # tokens_per_step: 2M         # where names only tell steps; {stage1: 4M, stage2: 2M} where stages differ
  # stage_tokens_before: {stage2: 3.9T}   # tokens of all stages before one
  # branch: ingredient1         # where a stage was trained in several branches
  # cache: /scratch/checkpoints # where downloads go,
  # disk_budget: 60G            # and the room that they may take; what is scored is removed again

tasks:                          # the first one's scores are the run's own; each other gets a folder in it
  - task: niah                  # needle in a haystack
    lengths: [256, 512, 1024]   # tokens of prompt and answer
    depths: [0, 25, 50, 75, 100]  # place of the needle, percent of the context
    samples: 2                  # haystacks per needle
    # needles: needles.jsonl    # {"needle", "question", "answer"} per line; left out: the bundled language
    # haystack: essays/         # a text file or a folder of them
    # prompt: paper             # paper, wu, or a template with {context} and {question}
    # chat: false               # inside the tokenizer's chat template
  # - task: interference        # the needle's distance to the question, and the text before it, one by one
  #   distances: [64, 256]
  #   interferences: [0, 128, 512]
  #   metrics: [retrieval]
  #   checkpoints: 4            # so many checkpoints, evenly from the base on; or all, last, ends, or a list of names
  # - task: longbio             # facts of made-up biographies

metrics: [retrieval, wu, copy, needle_mass]   # also qrscore, locos, dla, sink_mass, entropy, streaming
mode: teacher_forced            # or generate: the model writes, and only right answers count
# backend: transformers         # or transformer_lens, nnsight
# dtype: auto                   # float32 on a CPU; float32, bfloat16, float16
seed: 0

probes: []
  # - probe: ask                # questions over long prompts, after light fine-tuning (extra train)
  #   tasks: [longbio, ruler, mrcr]
  #   lengths: [512-1024]       # tokens, or bands of them
  #   sft: true                 # or false, or {epochs: 2, method: lora, ...}
  #   checkpoints: ends
  #   heads: ends               # and score the heads behind fine-tuning
  # - probe: corpus             # perplexity of long documents, and LongPPL
  #   corpora: [books/]
  #   length: 16K
  # - probe: lm-eval            # tasks of lm-evaluation-harness (extra eval)
  #   tasks: [niah_single_1]

ablations: []                   # the causal check
  # - k: [1, 2, 4]              # so many of the best heads are removed, and as many random ones
  #   checkpoints: last

figures: true                   # or {length: 1024, columns: 1, formats: [pdf, tex]}
report: true

execution:                      # how the work is done: may be changed at any time
  device: auto                  # cpu, cuda, cuda:1, mps
  executor: here                # or pool (processes of this machine), ray (RAY_ADDRESS says which cluster), slurm
  # workers: 4
  # gpus_per_worker: 1
  # slurm: {partition: gpu, time: 240}
  # chunk_tokens: 4096
"""
