"""The connection to MongoDB, its errors and its values. Knows no query."""
