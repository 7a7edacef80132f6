"""The page in headless Chromium: it loads, follows the sliders, streams both answers, shows errors, fits a phone."""

import contextlib
import json
import os
import shutil

import pytest

from gguflora.diagnostics import demo
from gguflora.server.settings import Settings
from support import serving
from support.serving import expected_text, wait_until

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's test needs playwright: pip install playwright"
)
CHROMIUM = os.environ.get("GGUFLORA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the page's test needs Chromium: apt-get install chromium, or set GGUFLORA_CHROMIUM"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=2048) as client:
        yield client


@pytest.fixture
def page(browser, http):
    yield from opened(browser, http)


def opened(browser, http, **options):
    """The page, loaded; at the end it must have complained of nothing and asked nobody else."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(30_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(str(http.base_url))
    yield page
    context.close()
    assert [text for text in said if "the server responded with a status of" not in text] == []
    assert all(url.startswith(str(http.base_url)) for url in asked)


def text_of(page, column):
    return page.locator(f"#{column} .text").inner_text()


def ask(page, prompt=serving.QUESTION):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask both").click()


def until_answered(page):
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=30_000)


def move(page, name, scale):
    """With the keyboard: Home, then steps of 0.05."""
    slider = page.get_by_role("slider", name=name)
    slider.press("Home")
    for _ in range(round(scale / 0.05)):
        slider.press("ArrowRight")


def test_it_shows_the_model_and_its_adapters(page):
    playwright.expect(page.locator("#model")).to_have_text("base")
    playwright.expect(page.get_by_role("slider")).to_have_count(2)
    slider = page.get_by_role("slider", name="shout")
    assert [slider.get_attribute(name) for name in ("min", "max")] == ["0", "2"]
    playwright.expect(page.get_by_role("alert")).to_be_hidden()


def test_both_columns_stream(page):
    page.add_init_script("""
        window.seen = {base: new Set(), adapted: new Set()};
        new MutationObserver(() => {
            for (const column of ["base", "adapted"])
                window.seen[column].add(document.querySelector(`#${column} .text`)?.innerText);
        }).observe(document, {subtree: true, childList: true, characterData: true});
    """)
    page.reload()
    ask(page)
    playwright.expect(page.locator("#base .numbers")).to_contain_text("tokens/s")
    until_answered(page)
    assert text_of(page, "base").strip() == expected_text().strip()
    assert text_of(page, "adapted").strip() == expected_text("shout").strip()
    for column in ("base", "adapted"):
        assert page.evaluate(f"window.seen.{column}.size") >= 3  # nothing, a part, and the whole
        assert "first after" in page.locator(f"#{column} .numbers").inner_text()


def test_a_moved_slider_changes_the_answer(page):
    ask(page)
    until_answered(page)
    move(page, "shout", 0.4)
    assert page.locator("#adapted .set").inner_text() == "shout at 0.4"
    wait_until(lambda: text_of(page, "adapted").strip() == expected_text("shout", 0.4).strip())
    move(page, "shout", 0)
    move(page, "verse", 0.5)
    wait_until(lambda: text_of(page, "adapted").strip() == expected_text("verse", 0.5).strip())
    assert page.locator("output").all_inner_texts() == ["0.00", "0.50"]
    assert text_of(page, "base").strip() == expected_text().strip()
    until_answered(page)


def test_heat_maps(page):
    playwright.expect(page.locator("figure")).to_have_count(2)
    cells = page.locator("figure").first.locator("td.cell")
    assert cells.count() == 28
    assert page.locator("figure").first.locator("tbody th").all_inner_texts()[:2] == ["attn_q", "attn_k"]
    page.locator("table").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    change = serving.httpx.get(f"{page.url}lora-adapters/0/changes").json()["changes"]
    wanted = next(row for row in change if row["name"] == "blk.1.attn_k.weight")
    readout = page.locator("figure figcaption span").first.inner_text()
    assert readout.startswith("blk.1.attn_k.weight: ")
    assert float(readout.split()[1]) == pytest.approx(100 * wanted["relative"], rel=0.06)
    hot = cells.nth(0).evaluate("cell => getComputedStyle(cell).backgroundColor")
    move(page, "shout", 0)
    cold = cells.nth(0).evaluate("cell => getComputedStyle(cell).backgroundColor")
    assert hot != cold


def test_stop(page):
    def without_end(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "logit_bias": {"1": -100}}))

    page.route("**/v1/completions", without_end)
    page.get_by_label("Tokens").fill("1500")
    page.get_by_label("Chat template").uncheck()
    ask(page, "The")
    playwright.expect(page.locator("#base .numbers")).to_contain_text("tokens")
    page.keyboard.press("Escape")
    until_answered(page)
    for _ in range(5):  # on a busy machine the answer may be there before the browser clicks
        ask(page, "The")
        try:
            page.get_by_role("button", name="Stop").click(timeout=2000)
            break
        except playwright.TimeoutError:
            until_answered(page)
    until_answered(page)
    playwright.expect(page.get_by_role("alert")).to_be_hidden()
    assert "1500 tokens" not in page.locator("#base .numbers").inner_text()


def test_keyboard_only(page):
    playwright.expect(page.get_by_role("slider")).to_have_count(2)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type(serving.QUESTION)
    page.keyboard.press("Control+Enter")
    wait_until(lambda: text_of(page, "adapted").strip() == expected_text("shout").strip())
    until_answered(page)


def test_each_adapter_apart(page, http):
    """Every adapter gets a column of its own, and all columns are decoded in the same batches."""
    move(page, "verse", 0.5)
    page.get_by_label("Each adapter apart").check()
    playwright.expect(page.locator("article h2")).to_have_text(["Base", "shout", "verse"])
    playwright.expect(page.locator("article .set")).to_have_text(["no adapter", "shout at 1", "verse at 0.5"])
    mixed = http.engine.stats().mixed_steps
    page.get_by_label("Prompt", exact=True).fill(serving.QUESTION)
    page.get_by_role("button", name="Ask all").click()
    until_answered(page)
    texts = [text.strip() for text in page.locator("article .text").all_inner_texts()]
    wanted = [expected_text(), expected_text("shout"), expected_text("verse", 0.5)]
    assert texts == [text.strip() for text in wanted]
    assert http.engine.stats().mixed_steps > mixed
    move(page, "shout", 0)
    playwright.expect(page.locator("article h2")).to_have_text(["Base", "verse"])
    page.get_by_label("Each adapter apart").uncheck()
    playwright.expect(page.locator("article h2")).to_have_text(["Base", "Adapted"])


def test_what_a_set_costs(page, http):
    playwright.expect(page.locator("#about")).to_contain_text("tokens of context")
    ask(page)
    until_answered(page)
    size = sum(each.size for each in http.engine.adapters() if each.name == "shout")
    playwright.expect(page.locator("#adapted .cost")).to_contain_text(f"adapters {round(size / 1000)} kB")
    playwright.expect(page.locator("#adapted .cost")).to_contain_text("% of the base's speed")
    playwright.expect(page.locator("#base .cost")).to_contain_text("model ")


def test_the_rendered_prompt(page, http):
    page.get_by_label("Prompt", exact=True).fill(serving.QUESTION)
    page.get_by_text("Prompt as the model reads it").click()
    chat = {"messages": [{"role": "user", "content": serving.QUESTION}]}
    rendered = page.get_by_label("Rendered prompt")
    playwright.expect(rendered).to_have_text(http.post("/apply-template", json=chat).json()["prompt"])
    page.get_by_label("Chat template").uncheck()
    playwright.expect(rendered).to_have_text(serving.QUESTION)


def test_prompts_by_templates_of_the_adapters(browser, tmp_path):
    shutil.copytree(demo.HERE / "shout", tmp_path / "shout")
    (tmp_path / "shout/chat_template.jinja").write_text("<{{ messages[0].content }}>")
    adapters = {"shout": tmp_path / "shout", "verse": serving.lora_file("verse")}
    with serving.serving(n_ctx=2048, adapters=adapters) as http:
        for page in opened(browser, http):
            page.get_by_label("Prompt", exact=True).fill(serving.QUESTION)
            page.get_by_text("Prompt as the model reads it").click()
            chat = {"messages": [{"role": "user", "content": serving.QUESTION}]}
            base = http.post("/apply-template", json=chat).json()["prompt"]
            rendered = page.get_by_label("Rendered prompt")
            playwright.expect(rendered).to_have_text(f"Base {base} Adapted <{serving.QUESTION}>")
            move(page, "shout", 0)
            playwright.expect(rendered).to_have_text(base)


def test_the_address_holds_what_is_set(page, browser, http):
    page.get_by_label("Tokens").fill("33")
    page.get_by_label("Prompt", exact=True).fill("What & why = 50%?")
    page.get_by_label("Chat template").uncheck()
    move(page, "shout", 0)
    move(page, "verse", 0.5)
    for other in opened(browser, http):
        other.goto(page.url)
        other.reload()
        playwright.expect(other.get_by_role("slider")).to_have_count(2)
        assert other.get_by_label("Prompt", exact=True).input_value() == "What & why = 50%?"
        assert other.get_by_label("Tokens").input_value() == "33"
        assert not other.get_by_label("Chat template").is_checked()
        assert other.locator("output").all_inner_texts() == ["0.00", "0.50"]
        playwright.expect(other.locator("#adapted .set")).to_have_text("verse at 0.5")
    playwright.expect(page.get_by_role("button", name="Copy link")).to_be_visible()


def test_adapters_are_loaded_and_unloaded(browser, tmp_path):
    shutil.copy(serving.lora_file("verse"), tmp_path / "poem.gguf")
    with serving.serving(Settings(allow_load=tmp_path), n_ctx=2048) as http:
        for page in opened(browser, http):
            page.get_by_label("Load", exact=True).fill("nowhere.gguf")
            page.get_by_role("button", name="Load", exact=True).click()
            playwright.expect(page.get_by_role("alert")).to_contain_text("does not exist")
            page.get_by_label("Load", exact=True).fill("poem.gguf")
            page.get_by_role("button", name="Load", exact=True).click()
            slider = page.get_by_role("slider", name="poem")
            playwright.expect(slider).to_have_value("1")
            playwright.expect(page.get_by_role("alert")).to_be_hidden()
            move(page, "shout", 0)
            ask(page)
            until_answered(page)
            assert text_of(page, "adapted").strip() == expected_text("verse").strip()
            page.get_by_role("button", name="Unload poem").click()
            playwright.expect(slider).to_have_count(0)
            assert [each.name for each in http.engine.adapters()] == ["shout", "verse"]
            playwright.expect(page.locator("figure")).to_have_count(2)


def test_adapters_of_a_directory_are_added(browser, tmp_path):
    shutil.copy(serving.lora_file("shout"), tmp_path / "loud.gguf")
    with serving.serving(adapters={}, adapter_dir=tmp_path, n_ctx=2048) as http:
        for page in opened(browser, http):
            playwright.expect(page.get_by_text("No adapter is loaded.").first).to_be_visible()
            page.get_by_label("From the directory").fill("quiet")
            page.get_by_role("button", name="Add").click()
            playwright.expect(page.get_by_role("alert")).to_contain_text("no quiet")
            page.get_by_label("From the directory").fill("loud")
            page.get_by_role("button", name="Add").click()
            playwright.expect(page.locator("#adapted .set")).to_have_text("loud at 1")
            ask(page)
            until_answered(page)
            assert text_of(page, "adapted").strip() == expected_text("shout").strip()
            playwright.expect(page.locator("figure")).to_have_count(1)  # it is loaded by now
            playwright.expect(page.get_by_role("button", name="Unload")).to_have_count(0)  # nothing allows it


def test_a_full_queue_is_shown(browser):
    with serving.serving(Settings(max_tokens=30_000), n_parallel=1, queue_size=2, n_ctx=32_768) as http:
        endless = {**serving.LONG, "max_tokens": 30_000, "stream": True}

        def wait_for_load(running, queued):
            wait_until(lambda: (http.engine.stats().running, http.engine.stats().queued) == (running, queued))

        with contextlib.ExitStack() as streams:
            for waiting in range(3):
                streams.enter_context(http.stream("POST", "/v1/completions", json=endless))
                wait_for_load(1, waiting)
            for page in opened(browser, http):
                playwright.expect(page.get_by_role("slider")).to_have_count(2)
                ask(page)
                playwright.expect(page.get_by_role("alert")).to_contain_text("429: ")
                for column in ("base", "adapted"):
                    playwright.expect(page.locator(f"#{column} .text")).to_contain_text("try again")
        wait_for_load(0, 0)
        for page in opened(browser, http):
            ask(page)
            until_answered(page)
            assert text_of(page, "base").strip() == expected_text().strip()


def test_a_key_is_asked_for(browser):
    with serving.serving(Settings(api_key="secret")) as http:
        for page in opened(browser, http):
            playwright.expect(page.get_by_role("alert")).to_contain_text("401")
            page.get_by_label("API key").fill("secret")
            page.get_by_role("button", name="Use key").click()
            playwright.expect(page.get_by_role("slider")).to_have_count(2)
            playwright.expect(page.get_by_role("alert")).to_be_hidden()
            ask(page)
            until_answered(page)
            assert text_of(page, "base").strip() == expected_text().strip()


def test_a_server_that_is_gone_is_shown(browser):
    with serving.serving() as http:
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(http.base_url))
        playwright.expect(page.get_by_role("slider")).to_have_count(2)
    ask(page)
    playwright.expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, http, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    for page in opened(browser, http, **phone):
        playwright.expect(page.locator("figure")).to_have_count(2)
        ask(page)
        until_answered(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        base, adapted = (page.locator(f"#{column}").bounding_box() for column in ("base", "adapted"))
        assert adapted["y"] >= base["y"] + base["height"]  # below each other
        for button in page.get_by_role("button").all():
            assert not button.is_visible() or button.bounding_box()["height"] >= 44
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back[4:-1].split(","))) > 380) == (scheme == "light")
        if folder := os.environ.get("GGUFLORA_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/phone-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_desktop(browser, http, scheme):
    for page in opened(browser, http, color_scheme=scheme):
        playwright.expect(page.locator("figure")).to_have_count(2)
        move(page, "verse", 1)
        ask(page)
        until_answered(page)
        base, adapted = (page.locator(f"#{column}").bounding_box() for column in ("base", "adapted"))
        assert adapted["x"] >= base["x"] + base["width"]  # beside each other
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200
        if folder := os.environ.get("GGUFLORA_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/desktop-{scheme}.png", full_page=True)
