"""The middleware of vLLM's server, which makes it without arguments."""

from __future__ import annotations

from l2pd_adapters.admission import Admission
from l2pd_adapters.body_limit import App, Receive, Scope, Send
from l2pd_adapters.request_guard import Refusal, RequestGuard, path_of

RULES = "l2pd_rules"
"""The attribute of the server's arguments (argparse) that has the rules for requests."""


OF_OTHER_MODELS = frozenset({"/generative_scoring", "/v1/systemone", "/scale_elastic_ep"})
"""Paths that need probabilities of single tokens, or that rebuild the engine."""


class VllmGuard(RequestGuard):
    """The guard with the rules in the server's arguments, which vLLM keeps in the application's
    state."""

    def __init__(self, app: App) -> None:
        super().__init__(app, closed=_closed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = scope["app"].state
            rules: Admission = getattr(state.args, RULES)
            self.mib = rules.request_body_mib
            # `vllm launch render` has no engine.
            self.values = rules.body_values(state.vllm_config.model_config.max_model_len)
        await super().__call__(scope, receive, send)


def _closed(scope: Scope) -> Refusal | None:
    path = path_of(scope)
    if path in OF_OTHER_MODELS:
        return 400, f"{path} does not serve diffusion language models"
    return None
