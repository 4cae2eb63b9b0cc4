"""Price discovery: from constraints to multipliers, with certificates."""
