"""Unmask policies in SGLang, for the whole server or per request.

SGLang finds `plugin.register` through its entry-point group ``sglang.srt.plugins``; nothing else
needs to be called. docs/serving_sglang.md describes how to launch a server and what a request may
set.
"""
