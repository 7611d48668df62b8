"""A temporary MongoDB and a generated shop, for the demo, the tests and the benchmark."""
