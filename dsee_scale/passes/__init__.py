"""Whole-model work: where algorithms meet partitioned weights."""
