"""Unmask policies in vLLM, for the whole server or per request.

vLLM finds `plugin.register` through its entry-point group ``vllm.general_plugins``; nothing else
needs to be called. docs/serving_vllm.md describes how to launch a server and what a request may
set.
"""
