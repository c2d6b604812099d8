"""Proof that operations and models are right on a machine: cases of the models, and verdicts."""
