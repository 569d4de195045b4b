"""A solver for layout problems too large to write as one program for HiGHS: a choice per node, a
cost per choice and per pair of choices across an edge, memory limits over time.

`problem` (the arrays, and what an assignment costs), `reduce` (a smaller problem with the same
optimum), `messages` and `prices` (the dual: a proved bound), `search` (assignments),
`exact` (HiGHS on what is left, if little), `solve`.
Needs the extra `solver`.
"""
