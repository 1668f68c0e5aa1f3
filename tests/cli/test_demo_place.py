"""Where the demo's tools run: a container if one really works here, else something weaker, and it says so."""

import shutil

import pytest

from nautile.cli import demo
from nautile.sandbox import doctor
from nautile.sandbox.doctor import Finding


@pytest.fixture
def place(tmp_path):
    made = []

    def choose(**options):
        made.append(demo._sandbox(tmp_path, options.get("unconfined", False)))
        return made[-1]

    yield choose
    for sandbox, _ in made:
        getattr(sandbox, "close", lambda: None)()


@pytest.mark.skipif(shutil.which("crun") is None, reason="crun is missing: make setup-sandbox")
def test_a_container_where_one_works(place):
    sandbox, why = place()
    assert sandbox.confinement == "container (crun)" and why == ""


@pytest.mark.parametrize(("function", "expected"), [("ok", "function (bubblewrap)"), ("degraded", "bubblewrap")])
def test_less_only_with_the_reason(place, monkeypatch, function, expected):
    findings = [Finding("function", function, "d"), Finding("container", "missing", "crun is missing", "apt-get install crun")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    sandbox, why = place()
    assert sandbox.confinement == expected and "crun is missing; apt-get install crun" in why


def test_unconfined_only_when_asked(place):
    assert place(unconfined=True)[0].confinement == "none"
