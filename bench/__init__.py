"""Benches: `python -m bench.NAME`. Nothing here is in the wheel."""

from anyflow_runtime.threads import settle_threads

settle_threads()  # before a bench imports torch
