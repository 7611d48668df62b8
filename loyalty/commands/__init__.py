"""One file for each command: what it does, what it prints, and its JSON."""
