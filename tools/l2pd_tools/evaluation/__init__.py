"""Decoding prompts with policies, and measuring the answers."""
