"""The engines: one folder each, importing its engine at its own top, and the command line.

This module imports nothing, so that one adapter never pulls in another's engine.
"""
