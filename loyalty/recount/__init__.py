"""One recount: count, compare, check, write, record."""
