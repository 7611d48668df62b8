"""What a recount costs, beside everything else that a shop could do: `python -m bench --help`."""
