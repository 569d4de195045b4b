"""Explicit collectives: apply an assignment, verify it, run it on virtual devices."""
