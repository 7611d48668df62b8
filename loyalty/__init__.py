"""The service itself: docs/architecture.md has the map."""
