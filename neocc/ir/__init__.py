"""The language: named dims, typed values, ops, regions. Imports nothing else of neocc."""
