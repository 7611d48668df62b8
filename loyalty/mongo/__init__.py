"""The connection to MongoDB, its errors and its values. It contains no queries of recounts."""
