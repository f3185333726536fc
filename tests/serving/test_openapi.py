"""Requests made from /openapi.json: none of them is answered with 500.

More of them, for each route and mode: `SERVE_CASES=500 pytest -s tests/serving/test_openapi.py`.
"""

import os
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from starlette.testclient import TestClient

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.serving import ServerSettings, create_app
from tests.serving.conftest import fake_scores
from tests.serving.fake_engine import FakeEngine

pytestmark = pytest.mark.once

CASES = int(os.environ.get("SERVE_CASES", 10))
URL = "http://testserver"


@pytest.fixture(scope="module")
def served(preprocessor):
    """Client and engine of one application."""
    engine = FakeEngine(preprocessor.tokenizer, "ok")
    app = create_app(TextEngine(engine, preprocessor, fake_scores), ServerSettings())
    with TestClient(app, base_url=URL) as client:
        yield client, engine


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_is_answered_with_500(served, mode):
    client, engine = served
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    statuses, failures = Counter(), []

    def check(case):
        request = case.as_transport_kwargs(URL)
        client.cookies.update(request.pop("cookies", None) or {})
        request["content"] = request.pop("data", None)
        response = client.request(**request)
        statuses[response.status_code] += 1
        if response.status_code >= 500:
            failures.append((case.as_curl_command(), response.text))

    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    for operation in operations:
        # Every path is valid, and a route without parameters has one request.
        has_parameters = bool(operation.body or operation.path_parameters)
        if operation.body or mode == "positive":
            strategy = operation.as_strategy(schemathesis.GenerationMode(mode))
            cases = CASES if has_parameters else 1
            run = settings(max_examples=cases, phases=[Phase.generate], **options)(
                seed(0)(given(strategy)(check))
            )
            run()
    print(mode, dict(statuses), f"{len(failures)} failures")
    assert not failures
    assert statuses[400] and engine.stats().slots_used == 0
