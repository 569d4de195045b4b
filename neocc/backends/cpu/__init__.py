"""A mesh of host devices: the same programs and collectives in one process, without a chip."""
