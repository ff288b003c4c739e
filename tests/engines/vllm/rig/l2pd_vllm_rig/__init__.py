"""The CPU rig of the vLLM suite; never part of a release.

As a backend of Triton's: with it vLLM finds Triton on a machine without a GPU and chooses its Model
Runner V2, whose kernels then run in Triton's interpreter. Nothing is ever compiled.
"""
