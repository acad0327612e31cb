"""The page of two runs, one of them a stranger's: whole, alone, and running nothing."""

import html.parser
import json
import re
import shutil
import subprocess
import types

import pytest
import trained_run
import training_runs

from xlformer import config as config_lib
from xlformer import report, runs
from xlformer.reporting import charts, history, measured, style
from xlformer.train import train

SCRIPT = "<script>alert(1)</script>"
NAME = f'{SCRIPT} $x_1^$ & "<b>'
VOID = {"meta", "link", "br", "img"}
SECTIONS = (
    "runs",
    "config",
    "curves",
    "evaluations",
    "places",
    "memories",
    "attention",
    "gates",
    "throughput",
    "samples",
)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A stranger's run, of a model of its own: whatever is a text is an attack."""
    folder = tmp_path_factory.mktemp("strange")
    text = folder / "text.txt"
    text.write_text((SCRIPT + "&amp; ") * 61, encoding="utf-8")
    config = training_runs.text_config(text, log_every=4)
    config.data.directory = str(folder / "prepared")
    config.name = NAME
    model = training_runs.bag(vocab_size=len(set(SCRIPT + "&amp; ")))
    train(config, folder / "run", model)
    card = {"split": SCRIPT, "bpc": [SCRIPT], "ppl": float("nan"), "step": 10**400}
    (folder / "run/evaluations").mkdir()
    (folder / "run/evaluations/1.json").write_text(json.dumps(card))
    (folder / "run/evaluations/2.json").write_text('{"split": "\x00')
    metrics = folder / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("goodput/attempt", "goodput/a"))
    with open(metrics, "a", encoding="utf-8") as file:
        for step in (SCRIPT, [1], 10**400, None):
            line = {"step": step, "kind": "train", "train/loss_nats": 1.0}
            file.write(json.dumps(line) + "\n")
        large = {"step": 1 << 62, "kind": "train", "train/loss_nats": 1.7e308}
        file.write(json.dumps(large) + "\n")
        for wrong in ({}, {"a": 1}, 1.7e308):
            line = {"step": 6, "kind": "eval", "eval/nats_per_token": wrong}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"step": 5, "kind": "goodput"}) + "\n")
        file.write("[" * 100_000 + "\n")
    return runs.load(folder / "run", model=model)


@pytest.fixture(scope="module")
def out(base, strange, tmp_path_factory):
    """Where the page of both runs lies."""
    out = tmp_path_factory.mktemp("report") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "LENGTHS", (0, 1))
        members = [trained_run.loaded(base), strange]
        report.write(members, out, tokens=101, made_by=SCRIPT)
    return out


@pytest.fixture(scope="module")
def page(out):
    return (out / "report.html").read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """Checks that each element is closed where it must be; keeps what is asked for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts[tag] = self.texts.get(tag, "") + data


def test_the_page_is_whole_and_loads_nothing(page):
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "srcset", "data", "action", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, name, value)
            if name == "style":
                assert "url(" not in value.replace("url(#", "")
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    assert "url(" not in reader.texts["style"] and "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for _, a in reader.tags if a.get("href", "")[:1] == "#"}
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    assert links | used <= set(ids)
    assert [a["id"] for tag, a in reader.tags if tag == "section"] == list(SECTIONS)
    assert "default-src 'none'" in page


def test_what_a_stranger_wrote_is_a_text(page):
    reader = Reader(page)
    assert "<script" not in page and "<b>&" not in page
    # The name, the sample and its prompt, the card, and what the page was made by.
    assert SCRIPT in reader.texts["h1"] and SCRIPT in reader.texts["td"]
    assert SCRIPT in reader.texts["b"] and SCRIPT == reader.texts["code"]
    # As it is in the pictures, dollars and all.
    assert NAME in reader.texts["text"]


def test_it_says_what_was_measured_with_what(page):
    text = re.sub(r"<[^>]+>", "", page)
    assert "100 tokens of validation, segments of 5, a memory of 7" in text
    assert "after 10 tokens" in text and "8 segments of 5 tokens" in text
    assert "These runs have different vocabularies" in text
    assert "not scored on one and the same text" in text
    # Of the two runs each lacks what the other has, and that stands in its place.
    assert "Bag tells nothing of what goes on inside of it" in text
    assert "it carries a state, which has no length that could be changed" in text
    assert "tiny has no evaluations" in text
    assert "its log does not say where the time went" in text
    for name in ("Layer 1", "Layer 3", "head 2", "as trained", "tokens per second"):
        assert name in text


def test_lines_differ_without_colours():
    assert len(set(charts._DASHES)) == len(style.SERIES) == len(style.SERIES_NIGHT)
    assert len(set(charts._MARKS)) == len(style.SERIES)


def test_pictures_lie_beside_it(out, page):
    names = sorted(path.name for path in out.glob("*.png"))
    assert {"training-loss.png", "places.png", "memories.png"} <= set(names)
    assert {f"attention-1-{layer}.png" for layer in (1, 2, 3)} <= set(names)
    assert len(names) == page.count("<svg")
    assert all(report.PICTURE.fullmatch(name.removesuffix(".png")) for name in names)
    assert all((out / n).read_bytes().startswith(b"\x89PNG") for n in names)


def test_a_picture_does_not_write_where_a_link_points(base, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    canary.write_text("as it was")
    (tmp_path / "training-loss.png").symlink_to(canary)
    # One is of an earlier page, one is nobody's business.
    for name in ("attention-9-9.png", "attention.png"):
        (tmp_path / name).write_text("")
    for part in ("Measured", "Insides"):
        monkeypatch.setattr(getattr(report, _home(part)), part, _nothing)
    argv = [f"--workdir={trained_run.trained(base)}", f"--out={tmp_path}"]
    assert report.main([*argv, "--samples=0"]) == 0
    assert canary.read_text() == "as it was"
    assert not (tmp_path / "training-loss.png").is_symlink()
    assert not (tmp_path / "attention-9-9.png").exists()
    assert (tmp_path / "attention.png").exists()


def _home(part):
    return "measured" if part == "Measured" else "insides"


class _nothing:
    def __init__(self, subject):
        self.subject, self.found, self.missing = subject, {}, []
        self.scale = measured.Scale.common(subject.members)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--workdir=DIR is missing"),
        (["--workdir={run}", "--workdir={run}/."], "are one run"),
        (["--workdir={copy}", "--workdir={run}"], "is a copy of"),
        (["--workdir={empty}"], "holds no run"),
        (["--workdir={bare}"], "there is no checkpoint"),
        (["--workdir={run}", "--out=/proc/x"], "--out=/proc/x: "),
        (["--workdir={run}", "--tokens=1"], "--tokens=1 must be at least 2"),
        (["--workdir={run}", "--split=tset"], "--split=tset, did you mean 'test'?"),
        (["--workdir={run}", "--samples=-1"], "--samples=-1 must be at least 0"),
        (["--workdir={run}", "--samples=101"], "at least 0 and at most 100"),
        (["--workdir={run}", "--checkpoint=77"], "77"),
        (["--workdr={run}"], "did you mean '--workdir'"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, capsys, argv, message):
    places = {name: tmp_path / name for name in ("copy", "empty", "bare")}
    places["empty"].mkdir()
    if "--workdir={copy}" in argv:
        trained_run.copy(base, places["copy"])
    places["bare"].mkdir()
    shutil.copy(trained_run.trained(base) / "config.json", places["bare"])
    places["run"] = trained_run.trained(base)
    argv = [item.format(**places) for item in argv]
    if not any(item.startswith("--out") for item in argv):
        argv.append(f"--out={tmp_path / 'out'}")
    assert report.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err
    assert not (tmp_path / "out").exists()


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
browser = next(filter(None, map(shutil.which, BROWSERS)), None)
# What only a browser knows of a page, told to the page around it: no window of Chromium
# is as narrow as a telephone, but a frame may be.
ASKS = """<script>
const heights = [...document.querySelectorAll('svg text, td, pre, p, figcaption')]
  .map(x => x.getBoundingClientRect().height).filter(h => h > 0);
const ends = [...document.querySelectorAll('svg, p, h1, h2, figcaption, pre')]
  .map(x => x.getBoundingClientRect().right);
parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth, window: innerWidth,
  least: Math.min(...heights), end: Math.max(...ends),
}), '*');
</script>"""
FRAME = """<script>
onmessage = event => document.body.dataset.found = event.data;
</script><iframe src="asked.html" width="{width}" height="900"></iframe>"""


@pytest.mark.skipif(browser is None, reason="no browser of the Chromium family")
def test_a_browser_shows_it_without_complaint(page, tmp_path):
    policy = re.compile(r"<meta http-equiv[^>]*>")
    asked = policy.sub("", page).replace("</body>", f"{ASKS}</body>")
    (tmp_path / "asked.html").write_text(asked, encoding="utf-8")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    _, said = _browse(tmp_path, "page.html")
    assert "CONSOLE" not in said, said
    for width in (1280, 400):
        frame = FRAME.format(width=width)
        (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}")
        shown, _ = _browse(tmp_path, "frame.html")
        (found,) = re.findall(r'data-found="([^"]*)"', shown)
        found = json.loads(html.unescape(found))
        # Nothing goes over the edge, and no letter is smaller than 9 pixels.
        assert found["width"] <= found["window"] == width
        assert found["end"] <= width and found["least"] >= 9


def _browse(folder, name):
    """(the page as it became, what was said on the way)."""
    argv = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    argv += ["--window-size=1400,900", "--enable-logging=stderr", "--log-level=0"]
    argv += ["--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"]
    argv.append(f"file://{folder / name}")
    done = subprocess.run(argv, capture_output=True, timeout=120)
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(("every", "when"), [(0, "at the end"), (40, "every 40")])
def test_a_run_without_validations_has_one_at_the_end(every, when):
    config = config_lib.load("quickstart")
    config.train.eval_every = every
    run = types.SimpleNamespace(config=config)
    caption = history._caption([types.SimpleNamespace(name="a", run=run)])
    assert caption.endswith(f" tokens {when}.")
