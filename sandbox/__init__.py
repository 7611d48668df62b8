"""A private MongoDB and an invented shop, for the demo, the tests and the benchmark."""
