"""Two layers at one board against two layers alone: a router over models on shared engines. SIMULATED."""
