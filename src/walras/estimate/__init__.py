"""Estimates from records, with their errors."""
