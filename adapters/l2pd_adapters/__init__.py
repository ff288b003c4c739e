"""The adapters for engines: one folder for each engine; only this folder imports the engine.

This module imports nothing, so that one adapter never pulls in another's engine.
"""
