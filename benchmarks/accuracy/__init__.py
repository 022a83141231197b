"""Exact answers of the reasoner, and tasks of lm-evaluation-harness."""
