"""The version of neocc, which plans and reports bear; pyproject.toml has it too."""

VERSION = "0.1.0"
