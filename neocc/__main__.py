"""``python -m neocc`` is ``neocc``."""

from neocc.cli import main

main()
