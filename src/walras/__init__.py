"""Walras: prices for agentic AI platforms."""
