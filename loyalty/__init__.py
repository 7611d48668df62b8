"""The service itself: CONTRIBUTING.md has the map."""
