"""What a plan costs: hardware figures, links of a mesh, collectives, compute."""
