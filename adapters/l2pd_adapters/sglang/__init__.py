"""Unmask policies in SGLang, for the whole server or per request.

SGLang finds `plugin.register` through its entry-point group ``sglang.srt.plugins``; nothing else is
to be called. docs/serving_sglang.md says how to launch a server and what a request may say.
"""
