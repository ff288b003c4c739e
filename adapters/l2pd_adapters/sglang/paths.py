"""Which paths of SGLang's HTTP server are open to requests.

SGLang has about ninety paths. Some serve other kinds of models, some change or stop the server, and
SGLang guards these only where the operator has set a key. Here a path is closed unless it is listed
as open, so that a newer SGLang opens none.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from l2pd_adapters.body_limit import Scope, headers_of
from l2pd_adapters.request_guard import Refusal, path_of

GENERATE = "/generate"
CHAT = ("/v1/chat/completions", "/invocations")
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
GENERATING = (GENERATE, *CHAT, COMPLETIONS, MESSAGES)
"""Paths that answer with text; their requests are checked."""

OPEN = frozenset(
    {
        *GENERATING,
        "/v1/messages/count_tokens",
        *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
        *("/", "/health", "/health_generate", "/ready", "/ping", "/metrics"),
        *("/v1/models", "/model_info", "/get_model_info"),
        *("/v1/loads", "/docs", "/openapi.json"),
    }
)
"""Not /server_info, whose answer has the keys of the server."""

OF_OTHER_MODELS = frozenset(
    {
        *("/encode", "/classify", "/v1/classify", "/v1/embeddings", "/v1/rerank", "/v1/score"),
        *("/v1/decisions", "/v1/systemone", "/v1/audio/transcriptions", "/v1/realtime"),
        *("/v1/responses", "/api/chat", "/api/generate", "/vertex_generate"),
    }
)
"""Paths that need embeddings or probabilities of single tokens, or that drop parameters without a
word."""


class Doors:
    """Says which requests are refused by their path. keys: what opens the operator's paths, the
    key of --admin-api-key or else that of --api-key."""

    def __init__(self, keys: Collection[str | None]) -> None:
        self.key = next((key for key in keys if key), None)

    def __call__(self, scope: Scope) -> Refusal | None:
        """HTTP status and message for a request that is refused, or None."""
        path = path_of(scope)
        if path in OPEN or path.startswith("/v1/models/") or scope.get("method") == "OPTIONS":
            return None
        if any(path == each or path.startswith(f"{each}/") for each in OF_OTHER_MODELS):
            served = ", ".join(GENERATING)
            return 400, f"{path} does not serve diffusion language models; {served} do"
        if self.key is None:
            return 403, f"{path} is for the operator; it needs a server with --admin-api-key"
        given = headers_of(scope).get(b"authorization", b"")
        if secrets.compare_digest(given, b"Bearer " + self.key.encode()):
            return None
        return 401, f"{path} is for the operator; it needs the key of --admin-api-key or --api-key"


def doors_of(server_args: Any) -> Doors:
    """The doors of a server with these ServerArgs."""
    return Doors([server_args.admin_api_key, server_args.api_key])
