"""The page in headless Chromium: streaming side by side, stop, escaping, Chinese, errors, and no request to another host."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, FakeTokenizer
from live_server import LiveServer, live_server

pytest.importorskip("gradio", reason="the extra [web] is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from serve.chat.backends import EngineBackend
from serve.config import ServeConfig
from serve.page.app import create_page, shown


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(delay_s=0.02, context_length=4000)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[LiveServer]:
    backends = [
        EngineBackend(engine, FakeTokenizer(), name, clip=True) for name in ("model fp16", "model int4")
    ]
    with live_server(engine, app=create_page(backends, ServeConfig())) as server:
        yield server


def browser(folder: Path, language: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900",
        f"--user-data-dir={folder}", f"--lang={language}", f"--accept-lang={language}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


@pytest.fixture(params=["en", "zh-CN"])
def page(server: LiveServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    driver = browser(tmp_path / "profile", request.param)
    try:
        driver.get(server.url)
        until(lambda: driver.find_elements(By.CSS_SELECTOR, "#prompt textarea"))
        yield driver
    finally:
        driver.quit()


def until(condition: Callable[[], object], timeout_s: float = 40) -> object:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not come to it"
        time.sleep(0.1)
    return found


def element(driver: webdriver.Chrome, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver: webdriver.Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
    return list(driver.execute_script(script, selector))


def test_the_page(page: webdriver.Chrome, server: LiveServer, engine: FakeEngine, tmp_path: Path) -> None:
    chinese = page.execute_script("return navigator.language").startswith("zh")
    assert element(page, "#send").text == ("发送" if chinese else "Send")
    assert not page.find_elements(By.CSS_SELECTOR, "input[type=file]")

    element(page, "#prompt textarea").send_keys("<img src=x onerror=alert(1)> 写一个故事")
    time.sleep(0.5)
    element(page, "#send").click()
    until(
        lambda: (
            [t for t in texts(page, ".bot.message") if "你好" in t] and len(texts(page, ".bot.message")) == 2
        )
    )
    first = texts(page, ".bot.message")
    until(
        lambda: all(len(b) > len(a) for a, b in zip(first, texts(page, ".bot.message"), strict=True))
    )  # it streams
    assert len(engine.live) == 2
    element(page, "#stop").click()
    until(lambda: not engine.live)
    until(lambda: all("stopped" in t for t in texts(page, ".speed")))
    assert all("tokens/s" in t for t in texts(page, ".speed"))
    left, right = texts(page, ".bot.message")
    assert "你好" in left and "你好" in right

    question = texts(page, ".user.message")
    assert len(question) == 2 and "<img src=x onerror=alert(1)> 写一个故事" in question[0]
    assert not page.find_elements(By.CSS_SELECTOR, ".message img[src=x]")
    page.save_screenshot(str(tmp_path / "page.png"))

    engine.fails = {str(n) for n in range(4000)}
    try:
        element(page, "#prompt textarea").send_keys("again")
        time.sleep(0.5)
        element(page, "#send").click()
        until(lambda: any("The step of this request failed" in t for t in texts(page, ".speed")))
        until(
            lambda: page.execute_script("return document.querySelector('#prompt textarea').value") == "again"
        )
    finally:
        engine.fails = set()
    answers = len(texts(page, ".bot.message"))
    element(page, "#prompt textarea").send_keys(Keys.SHIFT, Keys.ENTER, Keys.NULL, "and again", Keys.ENTER)
    until(lambda: len(texts(page, ".bot.message")) == answers + 2)  # Shift-Enter did not send, Enter did
    assert "again\nand again" in texts(page, ".user.message")[-1]
    element(page, "#clear").click()  # while it streams
    until(lambda: not engine.live)
    time.sleep(0.5)  # what was on its way must not bring the answer back
    assert not texts(page, ".bot.message") and not texts(page, ".user.message")

    hosts = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http", "ws")):
                hosts.add(url.split("/")[2])
    assert hosts == {f"127.0.0.1:{server.port}"}


def test_the_gate_stands_before_the_page(server: LiveServer) -> None:
    assert httpx.get(server.url, headers={"Host": "evil.test"}).status_code == 403
    assert httpx.get(server.url, headers={"Origin": "http://evil.test"}).status_code == 403
    upload = httpx.post(server.url + "/gradio_api/upload", files={"files": ("x.txt", b"x")})
    assert upload.status_code == 415
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://169.254.169.254/",
    ):
        assert httpx.get(server.url + path).status_code in (400, 403, 404)
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("<script>x</script> & *y*", "&lt;script&gt;x&lt;/script&gt; &amp; *y*"),
        ("`a<b` <i>", "`a<b` &lt;i&gt;"),
        ("```\n<b>\n``` <b>", "```\n<b>\n``` &lt;b&gt;"),
        ("```\n<b> unfinished", "```\n<b> unfinished"),
    ],
    ids=["H88-html", "H88-span", "H88-block", "H88-unfinished"],
)
def test_markup_is_shown_and_not_obeyed(text: str, view: str) -> None:
    assert shown(text) == view


@pytest.mark.parametrize("case", ["H88-huge-paste"])
def test_huge_paste(case: str, server: LiveServer, engine: FakeEngine) -> None:
    reply = httpx.post(server.url + "/gradio_api/queue/join", json={"data": ["x" * 3_000_000]}, timeout=30)
    assert reply.status_code == 413
