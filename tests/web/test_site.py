"""What is published: pages that are safe, whole and readable, a staged site whose links hold, and a
scan that refuses"""

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from made_run import make_run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from places import NOTEBOOKS, ROOT

from cot_distill.core.errors import InputError
from cot_distill.core.runs import RunFolder
from cot_distill.reading.frames import load_runs
from cot_distill.web.freeze import freeze, freeze_run
from cot_distill.web.pages import notebook_html, page, readable_html
from cot_distill.web.quarto import quarto_notebook, raw_html, signatures
from cot_distill.web.run_pages import render_reports
from cot_distill.web.safety import refuse_to_publish, safe_html, scan_text, visible
from cot_distill.web.site import make_site, stage_site, staged_notebooks

HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken=1'> \x1b[31mred\x1b[2J "
    "\u202e24 = 42\u202c $x$ ]]> &amp; {{ 7*7 }} {{< env HOME >}} ![x](http://x.example/x.png) "
    "</details></main>"
)
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def executed(title: str) -> nbformat.NotebookNode:
    "A small executed report that holds everything a page must bear"
    table = (
        "<div><style scoped>td {}</style><table border='1' "
        "class='dataframe'><tr><td>4</td></tr></table></div>"
    )
    png = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
        "WjR9awAAAABJRU5ErkJggg=="
    )
    cells = [
        new_markdown_cell(
            f"# {title}\n"
            "> One line\n\n"
            "## First\n"
            "On to [scores](03_eval.ipynb), [texts](reading/format.ipynb).\n\n"
            "## Second\n"
            "<script>window.broken = 1</script>"
        ),
        new_code_cell("#| export\ndef secret_sauce():\n    return 1"),
        new_code_cell("#| hide\nhidden_test()"),
        new_code_cell('teacher = "human"', metadata={"tags": ["injected-parameters"]}),
        new_code_cell("print(completion)", outputs=[new_output("stream", text=HOSTILE)]),
        new_code_cell(
            "completion",
            outputs=[
                new_output(
                    "execute_result",
                    {"text/plain": repr(HOSTILE), "text/html": table + HOSTILE},
                    execution_count=1,
                )
            ],
        ),
        new_code_cell(
            "said(completion)",
            outputs=[
                new_output(
                    "display_data",
                    {
                        "text/markdown": HOSTILE
                        + (
                            "\n\n"
                            "```{=html}\n"
                            "<script>window.broken = 1</script>\n"
                            "```\n\n"
                            "[x](javascript:x)"
                        )
                    },
                )
            ],
        ),
        new_code_cell(
            '#| label: fig-x\n#| fig-cap: "A dot"\n#| fig-alt: "One dot"\nplot()',
            outputs=[
                new_output(
                    "execute_result", {"text/plain": "<Axes: xlabel='x'>"}, execution_count=1
                ),
                new_output("display_data", {"image/png": png, "text/plain": "<Figure>"}),
            ],
        ),
        new_code_cell(
            "bar",
            outputs=[
                new_output(
                    "display_data",
                    {
                        "application/vnd.jupyter.widget-view+json": {},
                        "application/javascript": "window.broken=1",
                    },
                )
            ],
        ),
    ]
    return new_notebook(
        cells=cells,
        metadata={
            "papermill": {"end_time": "2026-11-22T20:00:00", "duration": 12.0, "exception": None}
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    "A made run with executed reports, hostile text in one answer and one rationale, rendered"
    folder = make_run(tmp_path_factory.mktemp("runs") / "made", 24, 24)
    for file in (
        folder / "evals/human/two-step.parquet",
        folder / "teachers/recorded/rationales.parquet",
    ):
        table = pd.read_parquet(file)
        table.loc[0, ["completion", "question"]] = HOSTILE
        table.to_parquet(file, index=False)
    (folder / "reports").mkdir()
    for name in (
        "00_teachers",
        "01_generate-human",
        "02_train-human",
        "03_eval-human",
        "03_eval-base",
        "04_analysis",
    ):
        nbformat.write(executed(name), folder / "reports" / f"{name}.ipynb")
    run = RunFolder(folder)
    render_reports(run)
    return run


@pytest.fixture(scope="module")
def pages(run: RunFolder) -> dict[str, BeautifulSoup]:
    return {
        path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in run.html_dir.glob("*.html")
    }


# ---------------------------------------------------------------- pages of a run


def test_there_is_a_page_for_every_report(pages: dict[str, BeautifulSoup]) -> None:
    assert set(pages) == {
        "index.html",
        "problems.html",
        "00_teachers.html",
        "01_generate-human.html",
        "02_train-human.html",
        "03_eval-human.html",
        "03_eval-base.html",
        "04_analysis.html",
    }
    linked = {link["href"] for link in pages["index.html"].find_all("a", href=True)}
    assert set(pages) - {"index.html"} <= linked


def test_every_link_leads_somewhere(pages: dict[str, BeautifulSoup]) -> None:
    for name, soup in pages.items():
        for link in soup.find_all("a", href=True):
            file, _, anchor = link["href"].partition("#")
            assert not file or file in pages, (name, link["href"])
            target = pages[file] if file else soup
            assert not anchor or target.find(id=unquote(anchor)), (name, link["href"])
    train = pages["02_train-human.html"]
    assert train.find("a", string="scores")["href"] == "03_eval-human.html"
    assert train.find("a", string="texts") is None  # the chapter on texts is no page of a run


def test_pages_are_self_contained(pages: dict[str, BeautifulSoup]) -> None:
    for name, soup in pages.items():
        for tag in soup.find_all(["script", "link", "img", "iframe", "source", "object", "embed"]):
            for attribute in ("src", "href", "srcset", "data"):
                assert tag.get(attribute, "data:").startswith("data:"), (name, tag)
        policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        assert "default-src 'none'" in policy and "http" not in policy
        assert "url(" not in soup.style.get_text() and "@import" not in soup.style.get_text()


def test_model_text_is_text(pages: dict[str, BeautifulSoup]) -> None:
    for name, soup in pages.items():
        scripts = soup.find_all("script")
        assert len(scripts) == (name == "problems.html"), name
        assert not soup.find_all(
            lambda tag: any(attribute.startswith("on") for attribute in tag.attrs)
        ), name
        assert not re.search("[\x00-\x08\x1b\u202a-\u202e\u2066-\u2069]", str(soup)), name
    shown = pages["problems.html"].get_text()
    assert "How it was read" in shown and "nothing is stated outright" in shown
    assert (
        "<script>window.broken = 1</script>" in shown
        and "[U+202E]24 = 42" in shown
        and "{{ 7*7 }}" in shown
    )


def test_pages_can_be_read_by_anyone(pages: dict[str, BeautifulSoup]) -> None:
    for name, soup in pages.items():
        assert soup.html["lang"] == "en" and soup.title.get_text().strip(), name
        assert len(soup.find_all("main")) == 1 and soup.find("a", class_="skip")["href"] == "#main"
        assert len(soup.find_all("h1")) == 1, name
        assert all(image.get("alt", "").strip() for image in soup.find_all("img")), name
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(ids) == len(set(ids)), name
        for table in soup.find_all("table"):
            assert table.parent.get("tabindex") == "0"
        for control in soup.find_all(["input", "select"]):
            assert control.find_parent("label")


def test_library_code_is_folded_and_tests_are_left_out(pages: dict[str, BeautifulSoup]) -> None:
    soup = pages["02_train-human.html"]
    folded = soup.find("details", class_="code")
    assert "secret_sauce" in folded.summary.get_text() and not folded.has_attr("open")
    assert "hidden_test" not in soup.get_text() and "#| " not in soup.get_text()
    assert (
        soup.find("figure").find("img")["alt"] == "One dot"
        and soup.find("figcaption").get_text() == "A dot"
    )
    assert "Parameters of this report" in soup.get_text() and "<Axes" not in soup.get_text()


def test_the_index_says_what_results_json_says(
    run: RunFolder, pages: dict[str, BeautifulSoup]
) -> None:
    results = json.loads(run.results_json.read_text())
    text = pages["index.html"].find("table").get_text(" ")
    for variant in results["variants"]:
        assert variant["variant"] in text and f"{100 * variant['accuracy']:.1f} %" in text
    assert len(pages["index.html"].find_all("figure")) == 4
    assert (
        "Texts made by a program" in pages["index.html"].get_text()
        and "smollm2-135m" in pages["index.html"].get_text()
    )


def test_tables_have_one_row_of_headings() -> None:
    table = pd.DataFrame(
        {"n": [4], "answer": ["w" * 50]}, index=pd.Index(["base"], name="student")
    ).to_html()
    soup = BeautifulSoup(readable_html(table), "html.parser")
    assert [cell.get_text() for cell in soup.find("thead").find_all("th")] == [
        "student",
        "n",
        "answer",
    ]
    assert soup.find("tbody").th["scope"] == "row" and "wordy" in soup.table["class"]
    assert "no rows" in readable_html(
        pd.DataFrame(columns=["n"]).to_html()
    ) and "<table" not in readable_html(pd.DataFrame().to_html())
    plain = BeautifulSoup(readable_html(pd.DataFrame({"n": [4]}).to_html()), "html.parser")
    assert [cell.get_text() for cell in plain.find_all("th")] == [
        "n",
        "0",
    ] and "wordy" not in plain.table["class"]


def test_a_stopped_stage_is_shown_as_one(tmp_path: Path) -> None:
    error = new_output(
        "error", ename="InputError", evalue="no key", traceback=["\x1b[31mTraceback\x1b[0m"]
    )
    html = notebook_html(new_notebook(cells=[new_code_cell("run()", outputs=[error])]))
    soup = BeautifulSoup(html, "html.parser")
    assert (
        "This stage stopped here" in soup.find(role="alert").get_text()
        and "no key" in soup.get_text()
    )
    assert soup.find("details").find("pre")  # the traceback is there, folded
    assert soup.find("a", href="#stopped")
    banner = new_markdown_cell(
        '<span id="papermill-error-cell">An Exception was encountered</span>',
        metadata={"tags": ["papermill-error-cell-tag"]},
    )
    stopped = new_notebook(
        cells=[banner, new_markdown_cell("# Eval"), new_code_cell("run()", outputs=[error])],
        metadata={"papermill": {"exception": True}},
    )
    run = make_run(tmp_path / "run", 8, 8)
    (run / "reports").mkdir()
    nbformat.write(stopped, run / "reports" / "03_eval-human.ipynb")
    index = BeautifulSoup(render_reports(RunFolder(run)).read_text(), "html.parser")
    assert "(stopped)" in index.find("a", href="03_eval-human.html").parent.get_text()
    assert "An Exception was encountered" not in (run / "html" / "03_eval-human.html").read_text()
    with pytest.raises(InputError, match=r"03_eval-human\.ipynb ended in an error"):
        freeze_run(RunFolder(run), tmp_path / "frozen")


def test_a_run_in_which_nothing_happened_has_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "new"\ndescription = "Nothing yet"\n')
    soup = BeautifulSoup(render_reports(RunFolder(tmp_path)).read_text(), "html.parser")
    assert "No trained student was scored yet." in soup.get_text()


def test_rendering_again_changes_nothing_and_removes_what_is_gone(run: RunFolder) -> None:
    before = {path.name: path.read_bytes() for path in run.html_dir.iterdir()}
    (run.html_dir / "02_train-gone.html").write_text("old")
    render_reports(run)
    assert {path.name: path.read_bytes() for path in run.html_dir.iterdir()} == before


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_opens_pages_without_errors_or_requests(run: RunFolder, tmp_path: Path) -> None:
    for name in ("index.html", "02_train-human.html", "problems.html"):
        net, shot = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--log-net-log={net}",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        done = subprocess.run(
            [
                CHROMIUM,
                *flags,
                "--window-size=1200,1600",
                f"--screenshot={shot}",
                (run.html_dir / name).as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert shot.stat().st_size > 10_000, done.stderr
        assert ":CONSOLE" not in done.stderr, [
            line for line in done.stderr.splitlines() if "CONSOLE" in line
        ]
        asked = set(
            re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', net.read_text(errors="replace"))
        )
        assert not {url for url in asked if not re.search(r"google|gstatic|chrome", url)}, (
            asked
        )  # the browser's own errands


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_filter_of_the_problems_page_works(run: RunFolder, tmp_path: Path) -> None:
    html = (run.html_dir / "problems.html").read_text(encoding="utf-8")
    probe = (
        "const s = document.querySelector('select[data-variant=\"base\"]'); s.value = 'right'; "
        "s.dispatchEvent(new Event('input', {bubbles: true})); document.title = "
        "count.textContent;"
    )
    copy = tmp_path / "problems.html"
    copy.write_text(
        html.replace("filter();\n</script>", f"filter();\n{probe}</script>"), encoding="utf-8"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    evals = load_runs([run.path]).evals.query("variant == 'base' and problem_set == 'two-step'")
    assert f"<title>{evals['is_correct'].sum()} of {24 + 24} problems</title>" in done.stdout


# ---------------------------------------------------------------- safety


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("OPENAI_API_KEY=sk-" + "proj-abc123def456ghi", "key"),
        ("AIza" + "SyA1b2c3d4e5f6g7h8i9j0k1l2m3n4", "key"),
        ("hf_" + "a" * 34, "key"),
        ("ghp_" + "B" * 36, "key"),
        ("File /" + "home/grace/project/x.py", "home folder"),
        ("/" + "Users/grace/x", "home folder"),
        ("/" + "root/.cache/huggingface", "home folder"),
        ("C:" + "\\Users\\grace\\x", "home folder"),
        ("file:///" + "home/grace/x", "home folder"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "key"),
        ("listening on 192.168." + "1.7:8000", "host name"),
        ("gpu-7." + "internal", "host name"),
    ],
)
def test_leaks_are_found(text: str, kind: str, tmp_path: Path) -> None:
    assert [found for _, found, _ in scan_text(f"fine\n{text}\n")][:1] == [kind]
    (tmp_path / "report.json").write_text(f"fine\n{text}\n")
    with pytest.raises(InputError, match=r"report\.json:2") as caught:
        refuse_to_publish([tmp_path], tmp_path)
    assert kind in str(caught.value) and (kind != "key" or text not in str(caught.value))


@pytest.mark.parametrize(
    "text",
    [
        "risk-free",
        "a task-12345678 of 10.5",
        "https://example.com/home/index.html",
        "/usr/lib/python3",
        "the /home page",
        "10.0.3",
        "x = self.local",
        "version 10.12.1",
        "sk-lesson-0123456789",
        "/home/ada/x",
    ],
)
def test_innocent_text_passes(text: str) -> None:
    assert list(scan_text(text)) == []


def test_a_key_in_the_environment_is_found_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "quite-ordinary-words")
    assert [kind for _, kind, _ in scan_text("sent quite-ordinary-words along")] == [
        "value of SOME_API_KEY"
    ]


def test_a_leak_in_a_table_is_found(tmp_path: Path) -> None:
    pd.DataFrame({"completion": ["see /" + "home/grace/x"], "n": [1]}).to_parquet(
        tmp_path / "t.parquet"
    )
    with pytest.raises(InputError, match="home folder"):
        refuse_to_publish([tmp_path], tmp_path)


@pytest.mark.parametrize(
    "html",
    [
        "<script>x</script>",
        "<img src=x onerror=x>",
        "<svg onload=x>",
        "<a href='javascript:x'>",
        "<iframe src=x>",
        "<style>@import 'x'</style>",
        "<p style='background:url(http://x)'>",
        "<object data=x>",
        "<form action=x>",
        "<base href=x>",
        "<meta http-equiv=refresh>",
    ],
)
def test_markup_that_runs_or_loads_is_taken_out(html: str) -> None:
    soup = BeautifulSoup(safe_html(html), "html.parser")
    assert not soup.find_all(
        ["script", "img", "svg", "iframe", "style", "object", "form", "base", "meta"]
    )
    assert "javascript:" not in str(soup) and "url(" not in str(soup)


def test_invisible_controls_become_words() -> None:
    assert visible("a\u202eb\x1b[0m\u2066c\x00") == "a[U+202E]b[U+001B][0m[U+2066]c[U+0000]"
    assert visible("tab\t line\n é 漢字 👩‍🔬") == "tab\t line\n é 漢字 👩‍🔬"


def test_titles_are_escaped() -> None:
    assert "<title>&lt;b&gt;</title>" in page("<b>", "")


# ---------------------------------------------------------------- frozen runs


def test_a_frozen_run_is_small_and_says_the_same(run: RunFolder, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    assert freeze(run.path, frozen) == {frozen: 0}
    size = sum(
        path.stat().st_size
        for path in frozen.rglob("*")
        if path.is_file() and path.suffix != ".ipynb"
    )
    assert size < 200_000
    a, b = load_runs([run.path]), load_runs([frozen])
    pd.testing.assert_frame_equal(a.results.drop(columns="run"), b.results.drop(columns="run"))
    pd.testing.assert_frame_equal(a.evals.drop(columns="run"), b.evals.drop(columns="run"))
    assert (frozen / "accuracy.svg").exists() and (
        frozen / "reports" / "04_analysis.ipynb"
    ).exists()


def test_freezing_a_leak_is_refused_and_the_old_copy_stays(run: RunFolder, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    freeze_run(run, frozen)
    leaky = RunFolder(shutil.copytree(run.path, tmp_path / "leaky"))
    notebook = nbformat.read(leaky.reports_dir / "04_analysis.ipynb", 4)
    notebook.cells[0].source += "\n/" + "home/grace"
    nbformat.write(notebook, leaky.reports_dir / "04_analysis.ipynb")
    with pytest.raises(InputError, match=r"reports/04_analysis\.ipynb:\d+: home folder"):
        freeze_run(leaky, frozen)
    assert load_runs([frozen]).results["n"].iloc[0] == 24
    assert not list(tmp_path.glob(".freeze-*"))


def test_frozen_without_texts_a_series_says_who_was_right_and_nothing_else(
    run: RunFolder, tmp_path: Path
) -> None:
    series, texts = tmp_path / "series", set()
    shutil.copytree(run.path, series / "one")
    shutil.copytree(run.path, series / "two")
    (series / "three").mkdir()
    for table in (series / "one").glob("**/*.parquet"):
        texts |= {
            str(text) for c in ("question", "completion") for text in pd.read_parquet(table)[c]
        }
    long = max(texts, key=len)
    quoting = new_notebook(
        cells=[
            new_code_cell(
                "x",
                outputs=[
                    new_output(
                        "execute_result",
                        data={"text/html": f"<td>{long.replace(' ', ' <b></b>')}</td>"},
                        execution_count=1,
                    ),
                    new_output("stream", text="6 answers\n"),
                ],
            )
        ]
    )
    nbformat.write(quoting, series / "one" / "reports" / "02_train-quoting.ipynb")
    before = freeze(series, tmp_path / "with")
    found = freeze(series, tmp_path / "out", texts=False)
    assert set(found) == {tmp_path / "out" / "one", tmp_path / "out" / "two"}
    assert found[tmp_path / "out" / "one"] == found[tmp_path / "out" / "two"] + 1
    assert set(before.values()) == {0}
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    words = " ".join(
        pd.read_parquet(p).to_csv() if p.suffix == ".parquet" else p.read_text() for p in files
    )
    plain = " ".join(re.sub("<[^>]+>", " ", words).split())
    assert long not in words and " ".join(long.split()) not in plain and "6 answers" in words
    assert not list((tmp_path / "out").rglob("rationales.parquet"))
    a, b = load_runs([run.path]), load_runs([tmp_path / "out" / "one"])
    pd.testing.assert_frame_equal(a.results.drop(columns="run"), b.results.drop(columns="run"))
    assert (a.evals["is_correct"] == b.evals["is_correct"]).all()


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, run: RunFolder) -> Path:
    "The project's site, with a published study made from the made run"
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("nbs", "cot_distill", "site"):
        shutil.copytree(
            ROOT / name,
            checkout / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("_quarto.yml", "index.qmd", "README.md", "settings.ini"):
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "reports" / "original-study", checkout / "reports" / "original-study")
    freeze_run(run, checkout / "reports" / "demo")
    freeze_run(run, checkout / "reports" / "family" / "small")
    (checkout / "reports" / "family" / "README.md").write_text(
        "# Family\n\nOne question, two sizes.\n"
    )
    nbformat.write(executed("Over all"), checkout / "reports" / "family" / "04_analysis.ipynb")
    return stage_site(checkout / "_proc", checkout)


def staged_texts(staged: Path) -> dict[Path, str]:
    "Markdown of all staged pages"
    texts = {path: path.read_text(encoding="utf-8") for path in staged.rglob("*.qmd")} | {
        staged / "README.md": (staged / "README.md").read_text(encoding="utf-8")
    }
    for path in staged.rglob("*.ipynb"):
        texts[path] = "\n\n".join(
            cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
        )
    return texts


def staged_markup(staged: Path) -> dict[Path, str]:
    "HTML of all outputs of the staged notebooks"
    markup = {}
    for path in staged.rglob("*.ipynb"):
        outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
        texts = [output.data["text/markdown"] for output in outputs]
        assert all(set(output.data) == {"text/markdown"} for output in outputs), path
        assert all(re.fullmatch(r"(`{3,})\{=html\}\n.*\n\1", t, flags=re.DOTALL) for t in texts), (
            path
        )
        markup[path] = "\n".join(text.partition("\n")[2].rpartition("\n")[0] for text in texts)
    return markup


def test_the_project_file_is_plain_and_its_pages_exist(staged: Path) -> None:
    project = yaml.safe_load((staged / "_quarto.yml").read_text(encoding="utf-8"))
    assert project["project"]["type"] == "website" and project["execute"] == {"enabled": False}
    assert project["format"]["html"]["html-math-method"] == "mathml"
    assert project["format"]["html"]["html-table-processing"] == "none"
    assert "pre-render" not in project["project"]  # that line only sends people here
    assert project["website"]["search"] and set(project["format"]["html"]["theme"]) == {
        "light",
        "dark",
    }
    text = json.dumps(project)
    for path in re.findall(r'"((?:nbs|site|api|reports)?/?[\w/]+\.(?:ipynb|qmd|scss))"', text):
        assert (staged / path).exists(), path
    for pattern in [
        *project["project"]["render"],
        *(found + "/*" for found in re.findall(r'"((?:nbs|api|reports)[\w/]*/\*\*)"', text)),
    ]:
        assert list(staged.glob(pattern)), pattern
    rendered = {path for pattern in project["project"]["render"] for path in staged.glob(pattern)}
    pages = {path for path in staged.rglob("*") if path.suffix in (".ipynb", ".qmd")}
    assert rendered == pages


def test_every_link_and_image_of_the_site_resolves(staged: Path) -> None:
    n_links = 0
    for path, text in staged_texts(staged).items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for href in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)", prose):
            if re.match(r"[a-z]+:|#", href):
                continue
            n_links += 1
            assert (path.parent / unquote(href.partition("#")[0])).is_file(), (
                path.relative_to(staged),
                href,
            )
    assert n_links > 40
    assert "/blob/main/configs/gsm8k.toml)" in (staged / "README.md").read_text(encoding="utf-8")


def test_staged_notebooks_are_pages_quarto_understands(staged: Path) -> None:
    for path in staged.rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        front = notebook.cells[0]
        assert front.cell_type == "raw" and yaml.safe_load(front.source.strip("-\n"))["title"], path
        labels = re.findall(
            r"^#\| label: (.*)$",
            "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"),
            flags=re.MULTILINE,
        )
        assert len(labels) == len(set(labels)), (path, labels)  # Quarto stops at the second of two
        for cell in notebook.cells[1:]:
            options = (
                re.findall(r"^#\| (.*)$", cell.source, flags=re.MULTILINE)
                if cell.cell_type == "code"
                else []
            )
            assert isinstance(yaml.safe_load("\n".join(options)) or {}, dict), (path, options)
            assert cell.cell_type != "markdown" or not re.search(
                r"^# ", re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL), flags=re.MULTILINE
            ), (path, cell.source[:80])


def test_nothing_of_the_site_runs_loads_or_deceives(staged: Path) -> None:
    for path, markup in staged_markup(staged).items():
        assert not re.search(
            "javascript:|application/javascript|widget-view|\u202e|\x1b",
            markup,
            flags=re.IGNORECASE,
        ), path
        soup = BeautifulSoup(markup, "html.parser")
        assert not soup.find_all(
            ["script", "style", "link", "iframe", "object", "embed", "svg", "form", "base", "meta"]
        ), path
        assert not soup.find_all(lambda tag: any(name.startswith("on") for name in tag.attrs)), path
        for image in soup.find_all("img"):
            assert image["src"].startswith("data:image/"), path
        assert "{{" + "<" not in path.read_text(encoding="utf-8"), (
            path
        )  # Quarto would put the value of a variable there
        assert "{{" not in markup, path


def test_hostile_text_stays_in_its_block() -> None:
    block = raw_html("<pre>\n```\n{{" + "< env HOME >}}\n````{=html}\n</pre>")
    fence = block.partition("{")[0]
    assert len(fence) == 5 and block.count(fence) == 2 and "{{" not in block


def test_hostile_answers_are_shown_as_text(staged: Path) -> None:
    markup = staged_markup(staged)[staged / "reports" / "demo" / "02_train-human.ipynb"]
    shown = BeautifulSoup(markup, "html.parser").find("pre").get_text()
    assert shown.startswith("<script>window.broken = 1</script><img src=x")
    assert "[U+202E]24 = 42" in shown and "{{ 7*7 }} {{< env HOME >}}" in shown


def test_figures_of_the_site_have_descriptions(staged: Path) -> None:
    n_figures = 0
    for path, markup in staged_markup(staged).items():
        for image in BeautifulSoup(markup, "html.parser").find_all("img"):
            n_figures += 1
            assert image["alt"].strip() and image["alt"] != "Figure without a description", path
            assert image.find_parent("figure").find("figcaption").get_text().strip(), path
    assert n_figures > 5
    for path in staged.rglob("*.qmd"):
        images = re.findall(r"!\[([^\]]+)\]\([^)]+\)(.*)", path.read_text(encoding="utf-8"))
        assert all("fig-alt=" in attributes for _, attributes in images), path


def test_every_chapter_holds_the_signatures_of_its_functions(staged: Path) -> None:
    for path in [path for path in NOTEBOOKS if path.parent.name != "nbs"]:
        exported = [
            c.source for c in nbformat.read(path, 4).cells if c.source.startswith("#| export")
        ]
        page_text = staged_texts(staged)[staged / path.relative_to(ROOT)]
        for source in exported:
            for name in re.findall(
                r"^(?:async )?(?:def|class) ([a-zA-Z]\w*)", source, flags=re.MULTILINE
            ):
                assert f"{{#api-{name} .signature}}" in page_text, (path, name)


def test_what_jupyterlab_keeps_beside_notebooks_is_not_staged(tmp_path: Path) -> None:
    kept = ".ipynb_checkpoints/00_x-checkpoint"
    for name in ("nbs/index", "nbs/00_x", f"nbs/{kept}", f"nbs/core/{kept}", f"reports/a/{kept}"):
        path = tmp_path / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert list(staged_notebooks(tmp_path)) == [Path("nbs/00_x.ipynb")]


def test_a_signature_ends_with_its_docstring() -> None:
    found = signatures(
        '@dataclass\nclass A:\n    "Doc"\n    x: int  # a | b\n    _y: int\n\n'
        '    def ask(self):\n        "Ask"\n        return 1\n\n    def _own(self): ...\n\n\n'
        'def f(\n    x: "int | None" = None,  # --flag\n) -> int:  # it\n    return x\n\n\n'
        "def _g(): ..."
    )
    assert set(found) == {"A", "f"}
    assert found["f"] == 'def f(\n    x: "int | None" = None,  # --flag\n) -> int:  # it'
    assert '"Ask"' in found["A"] and "return 1" not in found["A"] and "_own" not in found["A"]


def test_every_page_is_found_by_the_way_around(staged: Path) -> None:
    project = yaml.safe_load((staged / "_quarto.yml").read_text(encoding="utf-8"))
    website = project["website"]
    sidebars = {sidebar["id"]: json.dumps(sidebar["contents"]) for sidebar in website["sidebar"]}
    assert {item["text"].lower() for item in website["navbar"]["left"]} == set(sidebars)
    pages = {
        str(p.relative_to(staged)) for p in staged.rglob("*") if p.suffix in (".ipynb", ".qmd")
    }
    unlisted = {
        page_ for page_ in pages if not any(f'"{page_}"' in text for text in sidebars.values())
    }
    assert unlisted == {"index.qmd", "library.qmd", "reports/index.qmd"}
    folders = [entry["section"] for entry in json.loads(sidebars["library"]) if "section" in entry]
    assert {folder.lower() for folder in folders} == {
        path.name for path in (staged / "nbs").iterdir() if path.is_dir()
    }
    assert (
        '"Family"' in sidebars["studies"]
        and '"Texts made by a program, for tests"' in sidebars["studies"]
    )


def test_reports_are_neither_searched_nor_edited(staged: Path) -> None:
    for path in staged.rglob("*.ipynb"):
        front = yaml.safe_load(nbformat.read(path, 4).cells[0].source.strip("-\n"))
        is_report = path.is_relative_to(staged / "reports")
        assert (front.get("search"), front.get("repo-actions")) == (
            (False, False) if is_report else (None, None)
        ), path
        assert is_report or front["description"], path


def test_the_site_names_its_addresses_once(staged: Path) -> None:
    website = yaml.safe_load((staged / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert (
        website["site-url"] == settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]
    )
    assert website["repo-url"] == settings["DEFAULT"]["git_url"]
    assert (staged / website["favicon"]).exists() and (staged / website["image"]).exists()
    listed = re.findall(r"\]\(([^)]+)\)", (staged / "llms.txt").read_text(encoding="utf-8"))
    for address in listed:
        page_ = staged / address.removeprefix(website["site-url"])
        assert page_.with_suffix(".ipynb").exists() or page_.with_suffix(".qmd").exists(), address
    assert len(listed) > 40


def test_staging_outside_a_checkout_and_leaks_are_refused(staged: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no _quarto.yml"):
        stage_site(tmp_path / "out", tmp_path)
    checkout = staged.parent
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    try:
        (checkout / "README.md").write_text(readme + "\nsk-" + "abcdefgh12345678")
        with pytest.raises(InputError, match=r"README\.md:\d+: key"):
            stage_site(checkout / "_proc", checkout)
        assert "sk-q1w" not in (staged / "README.md").read_text(
            encoding="utf-8"
        )  # the former tree stays
    finally:
        (checkout / "README.md").write_text(readme, encoding="utf-8")


def test_without_quarto_one_is_told_how_to_go_on(
    staged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(staged.parent)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = make_site()
    assert "pip install quarto-cli" in said and "html/index.html" in said


def test_quarto_is_asked_to_render_the_staged_tree(
    staged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "quarto"
    fake.write_text('#!/bin/sh\nmkdir -p "$2/_site" && echo page > "$2/_site/index.html"\n')
    fake.chmod(0o755)
    monkeypatch.chdir(staged.parent)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert make_site("_site") == "The site is in _site/index.html"
    assert (staged.parent / "_site" / "index.html").read_text() == "page\n"
    fake.write_text("#!/bin/sh\necho 'no such theme' >&2; exit 1\n")
    with pytest.raises(InputError, match="no such theme"):
        make_site("_site")


def test_library_cells_are_folded_and_directives_gone() -> None:
    notebook = quarto_notebook(executed("Train"), {"title": "Train · human"})
    sources = [cell.source for cell in notebook.cells]
    assert any(
        source.startswith('#| code-fold: true\n#| code-summary: "Library code: secret_sauce"')
        and "secret_sauce" in source
        for source in sources
    )
    assert not any("#| export" in source or "hidden_test" in source for source in sources)
    assert yaml.safe_load(sources[0].strip("-\n")) == {
        "title": "Train · human",
        "description": "One line",
    }
    footer = quarto_notebook(
        new_notebook(
            cells=[new_markdown_cell("# A"), new_markdown_cell("---\n**Where this comes from**")]
        )
    )
    assert (
        footer.cells[-1].source == "* * *\n\n**Where this comes from**"
    )  # no second block of metadata


def test_studies_that_belong_together_have_a_page(staged: Path) -> None:
    folder = staged / "reports" / "family"
    overview = (folder / "index.qmd").read_text(encoding="utf-8")
    assert (
        "One question, two sizes." in overview
        and "(small/index.qmd)" in overview
        and "(04_analysis.ipynb)" in overview
    )
    assert (folder / "04_analysis.ipynb").exists() and (
        folder / "small" / "02_train-human.ipynb"
    ).exists()
    train = nbformat.read(folder / "small" / "02_train-human.ipynb", 4)
    links = re.findall(
        r"\]\(([^)]+)\)",
        "".join(cell.source for cell in train.cells if cell.cell_type == "markdown"),
    )
    assert links == [
        "03_eval-human.ipynb",
        "../../../nbs/reading/format.ipynb",
    ]  # the same teacher's next page; the chapter


def test_rendering_the_sources_themselves_is_refused_with_a_word() -> None:
    first = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["project"][
        "pre-render"
    ]
    done = subprocess.run([sys.executable, ROOT / first], capture_output=True, text=True)
    assert done.returncode == 1 and "make site" in done.stderr


# ---------------------------------------------------------------- several runs


def test_several_runs_are_analysed_together(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, n, 40, seed)
        for name, n, seed in (("small", 12, 0), ("full", 60, 1))
    ]
    command = [
        Path(sys.executable).parent / "cot-distill",
        "analyze",
        *runs,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    html = Path(done.stdout.strip()).read_text(encoding="utf-8")
    soup = BeautifulSoup(html, "html.parser")
    tables = [table for table in soup.find_all("table") if "examples" in table.get_text()]
    assert [row.th.get_text() for row in tables[0].tbody.find_all("tr")] == [
        "small",
        "small",
        "full",
        "full",
    ]
    assert "4 differences in 2 runs" in soup.get_text() and "12 problems" in soup.get_text()
    assert not re.search(r"(?<!\.\.)" + re.escape(str(tmp_path)), html), (
        "a path from the root; one that climbs there with ../ is relative"
    )
    assert not soup.find("script")
    wrong = subprocess.run(
        [*command[:2], runs[0], tmp_path / "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        wrong.returncode == 2
        and "nowhere is no run folder" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


# ---------------------------------------------------------------- benchmarks


def test_the_page_of_benchmarks_says_what_was_missed_and_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import common

    assert "Not run yet: `python benchmarks/train.py`" in common.shown("train", tmp_path)
    goals = [
        common.goal("speed, times", 2.0, 2.5),
        common.goal("load, %", 40.0, None),
        common.goal("waste, %", 1.0, 3.0, at_most=True),
    ]
    common.report(
        "train",
        [{"variant": "a|b", "speed": 2.5}],
        goals,
        [common.skipped("GPU", "there is none")],
        folder=tmp_path,
    )
    text = common.shown("train", tmp_path)
    assert text.startswith(
        "1 of 3 goals reached. **Not reached:** load, %: wanted 40, measured –; waste, %: "
        "wanted 1, measured 3."
    )
    assert "| a\\|b | 2.5 |" in text and "Not run: GPU (there is none)" in text


# ---------------------------------------------------------------- README


def test_the_readme_is_short_and_its_links_hold() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for href in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text):
        assert re.match(r"https?:", href) or (ROOT / href).exists(), href


# ---------------------------------------------------------------- the batch's last stage


def test_the_batch_makes_the_pages_in_a_process_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", 12, 16)
    command = [
        Path(sys.executable).parent / "cot-distill",
        "run",
        run / "config.toml",
        "--run-dir",
        run,
        "--stages",
        "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.strip().endswith("html/index.html") and (run / "html" / "index.html").is_file()
    )
