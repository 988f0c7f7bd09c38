"""A run against the oracle: the laws, what rounding allows, and the check before any use."""
