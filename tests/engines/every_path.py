"""Requests to every path of a server, made from what it says of itself (OpenAPI)."""

import itertools
import json

import httpx

VALUES = ("x", -1, 10**18, [[]], {"a": {"b": [1]}}, [None])


def hostile_requests(url, bodies, most):
    """(path, body) of up to so many requests: for every path that takes JSON, its body in `bodies`
    (path -> body of a good request; an empty one for the others) with one declared field of another
    value. The fields of all paths take turns."""
    spec = httpx.get(f"{url}/openapi.json", timeout=60).json()
    columns = []
    for path, methods in spec["paths"].items():
        if "post" not in methods:
            continue
        body = bodies.get(path, {})
        made = [
            (path.replace("{response_id}", "x"), {**body, name: value})
            for value in VALUES
            for name in _fields(methods["post"], spec["components"]["schemas"])
        ]
        columns.append(made or [(path, body)])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return list(itertools.islice((each for each in turns if each), most))


def _fields(operation, schemas):
    """The names that the body of a request may have."""
    content = operation.get("requestBody", {}).get("content", {})
    text = json.dumps([each["schema"] for each in content.values()])
    return sorted(
        {
            name
            for schema, declared in schemas.items()
            if f'"#/components/schemas/{schema}"' in text
            for name in declared.get("properties", {})
        }
    )


def check_every_path(url, bodies, most):
    """No request ends in a status of 5xx, or in a stream that breaks off; the server stays well."""
    found, statuses = [], set()
    with httpx.Client(base_url=url, timeout=60) as client:
        for path, body in hostile_requests(url, bodies, most):
            try:
                status = client.post(path, json=body).status_code
            except httpx.HTTPError as error:
                status = repr(error)
            statuses.add((path, status))
            if not isinstance(status, int) or status >= 500:
                found.append((path, body, status))
        assert client.get("/health").status_code == 200
    assert found == []
    return statuses
