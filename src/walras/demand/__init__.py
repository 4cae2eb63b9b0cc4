"""Demand: routing as screening [Z §3.1]; sequential search, exploration, stickiness."""
