"""The OpenAI-compatible service: it allocates at live prices and writes down what was paid."""
