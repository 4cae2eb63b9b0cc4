"""Synthetic economies that Walras generates itself: nothing here is, or is fitted to, anyone's data."""

from walras.simulate.sample import SAMPLE_SCHEMA, sample_batches, sample_log, write_sample

__all__ = ["SAMPLE_SCHEMA", "sample_batches", "sample_log", "write_sample"]
