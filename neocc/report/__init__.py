"""What a compilation found, for people (terminal) and for programs (JSON, files)."""
