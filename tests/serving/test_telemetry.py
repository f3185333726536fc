"""OpenTelemetry's traces of requests."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytestmark = pytest.mark.once

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch):
    """Exporter of the global provider, which may be set only once in a process."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    return exporter


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_the_trace_of_its_client(exporter, client, stream):
    body = {"messages": [{"role": "user", "content": "a secret"}], "stream": stream}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    response = client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    spans = exporter.get_finished_spans()
    (span,) = [span for span in spans if span.kind.name == "SERVER"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["http.route"] == "/v1/chat/completions"
    assert span.attributes["http.response.status_code"] == 200
    assert not any("secret" in span.to_json() for span in spans)


def test_an_exception_is_an_error_of_the_span(exporter, client, engine):
    engine.failure = RuntimeError("secret details")
    body = {"messages": [{"role": "user", "content": "a secret"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 500
    client.post("/v1/chat/completions", json=body | {"temperature": "a secret"})
    spans = [span for span in exporter.get_finished_spans() if span.kind.name == "SERVER"]
    assert [span.attributes["http.response.status_code"] for span in spans] == [500, 400]
    assert not any("secret" in span.to_json() for span in exporter.get_finished_spans())
