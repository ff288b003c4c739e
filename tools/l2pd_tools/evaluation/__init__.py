"""Prompts decoded under policies, and what can be measured on the answers."""
