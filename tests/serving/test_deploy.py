"""Files in examples/deploy: valid, and true to the command and the metrics of the server."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples/deploy"
API_KEY_VARIABLE = "KERAS_GEMMA_API_KEY"


def docker_instructions() -> list[tuple[str, str]]:
    """Returns name and arguments of each instruction, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)
    ]


def unit() -> configparser.ConfigParser:
    """Returns the systemd unit. Of a repeated setting, the last one counts."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str
    parser.read_string((DEPLOY / "keras-gemma.service").read_text())
    return parser


def manifests() -> dict[str, Any]:
    """Returns the objects of the Kubernetes manifest by kind."""
    objects = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {item["kind"]: item for item in objects}


def container() -> dict[str, Any]:
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def expressions() -> list[str]:
    """Returns the queries of the dashboard."""
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*queries, *(v["query"]["query"] for v in board["templating"]["list"][1:])]


def lint(*command: str) -> None:
    """Runs a linter, or skips the test if it is not installed."""
    program = shutil.which(command[0]) or shutil.which(command[0], path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfile():
    instructions = docker_instructions()
    names = [name for name, _ in instructions]
    first_words = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE"}
    assert set(names) <= first_words | {"HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    settings = dict(instructions)
    assert settings["FROM"].partition(" ")[0].endswith("-slim")
    assert settings["USER"] not in ("root", "0")
    assert names.index("ENTRYPOINT") > names.index("USER")
    entry = json.loads(settings["ENTRYPOINT"])
    assert entry[:2] == ["keras-gemma", "serve"]
    assert entry[entry.index("--port") + 1] == settings["EXPOSE"]
    assert f":{settings['EXPOSE']}/health" in settings["HEALTHCHECK"]
    for copied in (rest.split()[:-1] for name, rest in instructions if name == "COPY"):
        if not copied[0].startswith("--from"):
            assert [path for path in copied if not (ROOT / path).exists()] == []


def test_dockerfile_passes_hadolint():
    lint("hadolint", str(DEPLOY / "Dockerfile"))


def test_unit_passes_systemd_analyze(tmp_path):
    path = tmp_path / "keras-gemma.service"
    text = (DEPLOY / "keras-gemma.service").read_text()
    path.write_text(text.replace("/opt/keras-gemma/bin/keras-gemma", sys.executable))
    lint("systemd-analyze", "verify", str(path))


def test_unit_is_confined():
    service = unit()["Service"]
    assert service["ExecStart"].split()[1] == "serve"
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert API_KEY_VARIABLE not in service["ExecStart"]


def test_manifest():
    deployment, service = manifests()["Deployment"]["spec"], manifests()["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["replicas"] == 2
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels
    server = container()
    probes = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")}
    assert probes == {"readiness": "/ready", "liveness": "/live"}
    (port,) = server["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == int(dict(docker_instructions())["EXPOSE"])
    (variable,) = server["env"]
    assert variable["name"] == API_KEY_VARIABLE
    reference = variable["valueFrom"]["secretKeyRef"]
    assert reference["key"] in manifests()["Secret"]["stringData"]
    assert reference["name"] == manifests()["Secret"]["metadata"]["name"]
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    pod = deployment["template"]["spec"]
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert str(pod["securityContext"]["runAsUser"]) == dict(docker_instructions())["USER"]
    assert {"cpu", "memory"} <= set(server["resources"]["requests"])


def test_dashboard():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]})
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expressions())))
    assert used - {"__rate_interval"} <= variables
    for expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression


def serve_options() -> set[str]:
    """Returns the options of `keras-gemma serve`, and the environment variables that it reads."""
    serve = pytest.importorskip("keras_gemma.cli.serve").serve
    import typer

    app = typer.Typer()
    app.command()(serve)
    parameters = typer.main.get_command(app).params
    names = {name for parameter in parameters for name in parameter.opts}
    variables = (getattr(parameter, "envvar", None) or () for parameter in parameters)
    return names.union(*([each] if isinstance(each, str) else each for each in variables))


def metric_samples() -> set[str]:
    """Returns the names of all samples of the server's metrics."""
    metrics = pytest.importorskip("keras_gemma.serving.metrics")
    engine = SimpleNamespace(stats=lambda: Zeros(), is_healthy=True)
    suffixes = {
        "counter": ["_total"],
        "gauge": [""],
        "histogram": ["_bucket", "_sum", "_count"],
        "summary": ["_sum", "_count"],
    }
    families = metrics.ServerMetrics(engine, "model").registry.collect()
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


class Zeros:
    """Statistics of an engine, all of them 0."""

    def __getattr__(self, name: str) -> int:
        return 0


def test_options_exist():
    commands = [
        json.loads(dict(docker_instructions())["ENTRYPOINT"]),
        shlex.split(unit()["Service"]["ExecStart"]),
        container()["args"],
    ]
    used = {word for command in commands for word in command if word.startswith("--")}
    assert len(used) > 2
    assert used | {API_KEY_VARIABLE} <= serve_options()


def test_metrics_exist():
    used = set(re.findall(r"keras_gemma_\w+", " ".join(expressions())))
    assert len(used) > 20
    assert used <= metric_samples()
