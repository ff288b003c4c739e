"""Shared code of policies with trained filters: the filter and its folder, the policy, the
training.
"""
