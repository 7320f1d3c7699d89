"""The trace says what the memories do, the page holds it and shows it, and a browser can switch it."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from titans.data import ByteTokenizer
from titans.models import TitansConfig, build_model, probe_memories
from titans.reading import TextTrace, plot_trace, trace_text, write_page

FIELDS = {"vocab_size": 256, "d_model": 16, "n_layers": 2, "chunk_size": 8, "mem_heads": 2, "n_persistent": 3}
TEXT = "<b>naïve</b> & </script>\n\tto be or not to be 你好 " * 2
IDS = np.frombuffer(TEXT.encode(), dtype=np.uint8)


def model_of(variant):
    torch.manual_seed(0)
    return build_model(TitansConfig(variant=variant, **FIELDS)).double().eval()


@pytest.mark.parametrize("variant", ["LMM", "MAC", "MAG", "MAL"])
def test_values_are_those_of_the_probe(variant, monkeypatch):
    model = model_of(variant)
    monkeypatch.setattr("titans.models.memorize.PIECE", 16)
    trace = trace_text(model, IDS)
    assert trace.layers == ("blocks.0", "blocks.1") and trace.start == 0
    assert {x.shape for x in trace.values.values()} == {(2, 2, len(IDS))}
    monkeypatch.setattr("titans.models.memorize.PIECE", 4096)
    whole = trace_text(model, IDS)
    for name in ("surprise", "loss", "theta", "eta", "alpha"):
        np.testing.assert_allclose(trace.values[name], whole.values[name], rtol=1e-5)
    np.testing.assert_allclose(trace.nats, whole.nats, rtol=1e-5)
    logits = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(IDS.astype(np.int64))[1:])
    assert np.isnan(trace.nats[0]) and np.nanmean(trace.nats) == pytest.approx(expected.item())
    later = trace_text(model, IDS, model.memorize(torch.from_numpy(IDS.astype(np.int64))))
    reading = probe_memories(model, torch.from_numpy(IDS.astype(np.int64))[None], model.memorize(TEXT))
    assert later.start == len(IDS)
    for layer, told in enumerate(reading):
        assert later.values["surprise"][layer].mean() == pytest.approx(told.surprise, rel=1e-5)
        assert later.values["alpha"][layer].mean() == pytest.approx(told.alpha, rel=1e-5)


def test_models_without_a_memory_and_batches_are_refused():
    with pytest.raises(ValueError, match="model has no memory: its variant is 'transformer'"):
        trace_text(build_model(TitansConfig(variant="transformer", **{**FIELDS, "mem_heads": None})), IDS)
    model = model_of("LMM")
    with pytest.raises(ValueError, match="memory holds 2 streams"):
        trace_text(model, IDS, model.memorize(TEXT).fork(2))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "page.html"
    trace = trace_text(model_of("MAC"), IDS)
    write_page(trace, ByteTokenizer(), path, "a <title>", "about")
    plot_trace(trace, path.with_suffix(".png"), "a title")
    return trace, path


def test_the_page_holds_the_trace_and_needs_nothing_else(page):
    trace, path = page
    content = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?:|fetch\(", content)
    (told,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content)
    data = json.loads(told)
    assert "".join(data["tokens"]) == TEXT and len(data["tokens"]) == len(IDS)
    assert (data["title"], data["start"], data["heads"], data["layers"]) == ("a <title>", 0, 2, ["0", "1"])
    assert [q["key"] for q in data["quantities"]] == [*trace.values, "nats"]
    for quantity in data["quantities"]:
        values = trace.values.get(quantity["key"], trace.nats[None, None])
        codes = np.frombuffer(base64.b64decode(quantity["codes"]), "<u2").reshape(values.shape)
        low, high = np.array(quantity["ranges"]).T.reshape(2, *values.shape[:2], 1)
        found = np.where(codes == 65535, np.nan, low + (high - low) * codes / 65534)
        np.testing.assert_allclose(found, values, atol=float(np.nanmax(np.abs(values))) * 2e-5)
    assert np.isnan(trace.values["after"]).any()


def test_values_that_are_all_alike_or_all_missing(tmp_path):
    nothing = np.full((1, 1, 3), np.nan, dtype=np.float32)
    trace = TextTrace(
        IDS[:3], 0, ("blocks.0",), {"surprise": nothing + 1, "after": nothing, "loss": nothing * 0}, nothing[0, 0]
    )
    write_page(trace, ByteTokenizer(), tmp_path / "p.html", "t")
    plot_trace(trace, tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_the_picture_is_a_png(page):
    assert page[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


SWITCH = """<script>
const seen = [], text = () => spans.map(s => s.className).join(",");
for (const group of ["quantities", "layers", "heads"])
  for (const button of find(group).querySelectorAll("button")) {
    const start = performance.now();
    button.click(); document.body.offsetHeight;
    const colours = new Set(spans.map(s => s.className)).size;
    const took = performance.now() - start, ends = ["low", "high"].map(id => find(id).textContent);
    seen.push([button.textContent, ...ends, colours, took]);
  }
page.children[4].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(
  { seen, tip: tip.textContent, opened: +document.documentElement.dataset.ready, text: page.textContent }) }));
</script></body>"""


def browse(path, tmp_path):
    """What the page shows in Chromium when everything is pressed once."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    copy = tmp_path / "switched.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", SWITCH), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *words, copy.as_uri()], capture_output=True, text=True, timeout=240)
    (told,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(told))


def test_a_browser_shows_and_switches_it(page, tmp_path):
    found = browse(page[1], tmp_path)
    assert found["text"] == TEXT.replace("ï", "·ï").replace("你好", "··你··好")
    names = [name for name, *_ in found["seen"]]
    assert names == [
        "surprise",
        "inner loss",
        "inner loss after",
        "θ",
        "η",
        "α",
        "model's loss",
        "mean",
        "0",
        "1",
        "mean",
        "0",
        "1",
    ]
    assert all(colours > 3 for *_, colours, _ in found["seen"])
    shown = [(low, high) for _, low, high, *_ in found["seen"][:7]]
    assert len(set(shown)) == 7
    trace = page[0]
    low, high = (float(x) for x in shown[0])
    assert low == pytest.approx(np.quantile(trace.values["surprise"].mean((0, 1)), 0.02), rel=0.05)
    assert high == pytest.approx(np.quantile(trace.values["surprise"].mean((0, 1)), 0.98), rel=0.05)
    assert '"a"' in found["tip"] and "token 4" in found["tip"] and "surprise" in found["tip"]
