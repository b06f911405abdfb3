"""The HTML report in a real headless Chromium: nothing missing, nothing fetched, nothing complained about."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from conftest import PYTHON_LM, ROOT, sparse_weight
from playwright.sync_api import sync_playwright
from test_cli import cli

from sparse_backend.compiler import calibrate
from sparse_backend.compiler.analysis_page import to_html
from sparse_backend.compiler.analyze import analyze

sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tests" / "compiler"))
import browser
from test_analyze import PROFILE, save

# Sizes of what is drawn, and whether anything is wider than the window.
_MEASURE = """() => ({
  pictures: [...document.querySelectorAll('figure svg')].map(svg => ({
    width: svg.getBoundingClientRect().width, height: svg.getBoundingClientRect().height,
    label: svg.getAttribute('aria-label'), role: svg.getAttribute('role'),
    paths: [...svg.querySelectorAll('path, use, image')].filter(e => e.getBoundingClientRect().width > 0).length,
    caption: svg.parentElement.querySelector('figcaption').textContent})),
  images: [...document.querySelectorAll('svg image')].map(i => i.getBoundingClientRect().width),
  headings: [...document.querySelectorAll('h1, h2')].map(h => h.textContent),
  tables: [...document.querySelectorAll('table')].map(t => [t.caption.textContent, t.tBodies[0].rows.length]),
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  title: document.title, lang: document.documentElement.lang, scripts: document.scripts.length})"""


@pytest.fixture(scope="session")
def chromium():
    path = browser.find()
    assert path, "no Chromium or Chrome on this machine: run make env-browser"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(chromium, path, width=1000):
    """What the page holds, and everything it fetched or complained about."""
    page = chromium.new_page(viewport={"width": width, "height": 800})
    fetched, complaints = [], []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    found = page.evaluate(_MEASURE)
    page.close()
    fetched = [url for url in fetched if not url.startswith("data:")]
    return found, fetched, complaints


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    profile = path.with_name("profile.json")
    calibrate.save(PROFILE, profile)
    result = cli("analyze", PYTHON_LM, "--html", path, SPARSE_BACKEND_PROFILE=str(profile))
    assert result.returncode == 0, result.stderr
    return path


def test_the_report_opens_offline(chromium, report):
    found, fetched, complaints = visit(chromium, report)
    assert fetched == [report.as_uri()]
    assert complaints == []
    assert found["scripts"] == 0
    assert (found["lang"], found["title"]) == ("en", "python-lm: what its weights hold")
    assert found["headings"] == [found["title"], "What it means", "Pictures", "Tables", "Every projection"]
    titles = [title for title, _ in found["tables"]]
    assert [t.split(":")[0] for t in titles[:3]] == [
        "Magnitudes", "Magnitude kept after pruning this share of each matrix; energy in the largest singular values",
        "Structure",
    ]  # fmt: skip
    assert [rows for _, rows in found["tables"]][:3] == [8, 8, 8]
    assert found["tables"][-1] == ["One row per matrix", 42]
    assert titles[3] == "Predicted: every projection once, on a test's machine"
    assert len(found["pictures"]) == 4
    assert "lossy" in found["pictures"][3]["label"]
    for picture in found["pictures"]:
        assert picture["width"] > 500
        assert picture["height"] > 100
        assert picture["paths"] > 20
        assert picture["role"] == "img"
        assert len(picture["label"]) > 40
        assert picture["label"] == picture["caption"]
    assert len(found["images"]) == 8  # seven heat maps and their scale
    assert min(found["images"]) > 10
    assert len(set(found["ids"])) == len(found["ids"])


def test_the_report_names_no_address_and_fits_a_phone(chromium, report):
    text = report.read_text()
    assert re.findall(r"https?:|//\w+\.\w+|@import|url\((?!#)", text) == []
    assert "default-src 'none'" in text
    found, _, complaints = visit(chromium, report, width=390)
    assert found["overflow"] <= 0
    assert complaints == []


def test_names_from_a_checkpoint_are_text(chromium, tmp_path):
    name = 'a.0.<img src="x" onerror="alert(1)">$\\alpha$&'
    weights = {f"{name}.{i}.up_proj.weight": sparse_weight(20, 30, 0.5, seed=i) for i in range(2)}
    weights["b.<script>1</script>.weight"] = torch.full((8, 8), float("nan"))
    weights["c.<script>1</script>.weight"] = torch.ones(8, 8)
    folder = save(tmp_path / "<b>model", weights, {"architectures": ["<i>X</i>"]})
    (tmp_path / "report.html").write_text(to_html(analyze(folder)))
    found, fetched, complaints = visit(chromium, tmp_path / "report.html")
    assert found["headings"][0] == "<b>model: what its weights hold"
    assert (len(fetched), complaints, found["scripts"]) == (1, [], 0)
    assert "&lt;i&gt;X&lt;/i&gt;" in (tmp_path / "report.html").read_text()
