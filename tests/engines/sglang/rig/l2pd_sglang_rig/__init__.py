"""The CPU rig of the SGLang suite; never part of a release."""
