"""Layouts: the algebra, the problem, its solution."""
