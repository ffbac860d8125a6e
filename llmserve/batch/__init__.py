"""OpenAI batch files, run offline: every line answered exactly once, through any crash.

The life of a job (``job.py`` says it in code)::

    jobs.jsonl ── format ──> lines, all checked before anything runs
                               │
                 journal ──────┤  answers that an earlier run has finished are left out
                               v
                             runner ──> responder ──> the engine
                               │
                               v
                             journal   each answer durable before it counts as done
                               │
                               v
                             results   answers.jsonl and the error file, whole and in input order

It knows the engine only through ``llmserve.openai``, and no HTTP.
"""
