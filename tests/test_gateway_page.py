"""The page at `/` in a real Chromium: live prices, budgets and decisions, no harm from hostile names, nothing from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from gateways import Service, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SOON_MS = 20_000
"""The page asks every two seconds; a busy machine gets its time."""

HOSTILE = "<img src=x onerror=alert(1)>"
MODEL = "\"'><script>alert(2)</script>"
SETTINGS = """
value = 1.0
budget_usd = 0.00001
[gateway]
reclear_s = 0.3
budget_usd = 3.0
[upstreams.simulated]
kind = "simulated"
[models.simulated-small]
upstream = "simulated"
input_usd = 0.1
output_usd = 0.4
quality = 0.4
output_tokens = 8
[models."\\"'><script>alert(2)</script>"]
upstream = "simulated"
upstream_model = "simulated-medium"
input_usd = 0.8
output_usd = 3.2
quality = 0.6
output_tokens = 8
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("page"), SETTINGS) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "this machine has no Chromium: apt-get install chromium"
        pytest.skip("this machine has no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Any]:
    """A page that fails the test if a script of a name ran, a script broke, or anything was asked of somebody else."""
    context = browser.new_context()
    context.set_default_timeout(SOON_MS)
    found, wrong, asked = context.new_page(), [], list[str]()
    found.asked = asked
    found.on("dialog", lambda dialog: (wrong.append(f"alert: {dialog.message}"), dialog.dismiss()))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    yield found
    context.close()
    assert wrong == []
    assert asked
    assert [url for url in asked if not url.startswith((service.url, "data:"))] == []


def ask(service: Service, key: str, model: str = "auto", **headers: str) -> str:
    """One call of a model; its request id."""
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
    names = {f"x-walras-{name}": value for name, value in headers.items()}
    request = urllib.request.Request(
        f"{service.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {key}", **names},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.headers["x-request-id"])


def decision(page: Any, request_id: str) -> Any:
    """The decision of one request, opened."""
    page.wait_for_function("id => known.has(id)", arg=request_id)
    details = page.evaluate_handle("id => known.get(id)", request_id).as_element()
    if details.get_attribute("open") is None:
        details.query_selector("summary").click()
        details.wait_for_selector(".inside")
    page.mouse.move(0, 0)
    return details


def test_it_shows_prices_budgets_and_decisions_and_goes_on_by_itself(page: Any, service: Service) -> None:
    key = service.make_key("acme", budget_nano=2_000_000_000, period="hour")
    page.goto(f"{service.url}/#key={service.key}")
    page.get_by_text("live", exact=True).wait_for()
    assert "#" not in page.url, "the secret stays out of the address bar and of history"
    first = ask(service, key, **{"class": "question"}, session="s-1", value="0.5")
    opened = decision(page, first)
    text = opened.inner_text()
    for said in ("V·ΔQ", "π·ΔC", "λ·ΔL", "ρ·ΔR", "net value", "V $0.500", "session s-1", first):
        assert said in text
    rows = [row.inner_text().split("\t") for row in opened.query_selector_all("tr")[1:]]
    assert {row[0] for row in rows} == {"simulated-small", MODEL}
    for _, *terms, _ in rows:  # what is shown adds up
        value, *costs, net = (float(x.replace("$", "").replace("−", "-")) for x in terms)
        assert net == pytest.approx(value - sum(costs), abs=1e-4)
    page.get_by_text("acme · question").wait_for()
    page.get_by_role("cell", name="budget 1e-05 usd/task").wait_for()
    page.get_by_text("Certified").wait_for()
    page.get_by_role("cell", name="tenant acme").wait_for()
    page.get_by_role("cell", name="$2.00").wait_for()
    opened.hover()
    second = ask(service, key)
    page.get_by_text("1 newer once the pointer leaves").wait_for()
    assert not page.evaluate("id => known.has(id)", second), "nothing moves under the pointer"
    page.mouse.move(0, 0)
    decision(page, second)
    assert opened.get_attribute("open") is not None, "what was open stays open"


def test_a_price_is_shown_as_it_is(page: Any, service: Service) -> None:
    for _ in range(4):  # worth more than the budget of 10 millionths of a dollar for each can buy
        ask(service, service.key, value="5")
    page.goto(f"{service.url}/#key={service.key}")
    page.get_by_text("+1 usd gains").wait_for()
    asked = urllib.request.Request(
        f"{service.url}/v1/prices", headers={"authorization": f"Bearer {service.key}"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        served = json.load(answer)["prices"][0]
    assert served["multiplier"] > 0
    shown = float(page.locator("#prices tbody td.n").inner_text())
    assert shown == pytest.approx(served["multiplier"], rel=0.5)  # found again in between, perhaps


def version(page: Any) -> int:
    said = page.locator("#certificate").inner_text()
    return int(said.split("Version ")[1].split(",")[0])


def wait_for_newer(page: Any, service: Service) -> None:
    """Prices of a later version than is shown."""
    page.get_by_text("live", exact=True).wait_for()
    before = version(page)
    ask(service, service.key, "simulated-small")
    shown = "n => +/Version (\\d+)/.exec(document.getElementById('certificate').textContent)[1] > n"
    page.wait_for_function(shown, arg=before)


def times(page: Any, path: str) -> int:
    return sum(url.endswith(path) for url in page.asked)


def test_prices_come_by_themselves(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key={service.key}")
    for _ in range(2):
        wait_for_newer(page, service)
    assert (times(page, "/v1/prices"), times(page, "/v1/prices/stream")) == (0, 1)


def test_where_the_stream_breaks_prices_are_asked_for_and_it_is_tried_again(
    page: Any, service: Service
) -> None:
    page.route("**/v1/prices/stream", lambda route: route.abort())
    page.goto(f"{service.url}/#key={service.key}")
    wait_for_newer(page, service)
    assert times(page, "/v1/prices") > 0
    page.unroute("**/v1/prices/stream")
    tried = times(page, "/v1/prices/stream")
    page.wait_for_function("() => !polled")
    assert times(page, "/v1/prices/stream") == tried + 1
    polled = times(page, "/v1/prices")
    wait_for_newer(page, service)
    assert times(page, "/v1/prices") == polled


def test_a_page_that_is_hidden_holds_no_connection(page: Any, service: Service) -> None:
    page.goto(f"{service.url}/#key={service.key}")
    page.get_by_text("live", exact=True).wait_for()
    hide = """hidden => { Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange")); }"""
    page.evaluate(hide, True)
    page.wait_for_function("() => stream.signal.aborted")
    asked = len(page.asked)
    page.wait_for_timeout(2_500)
    assert len(page.asked) == asked
    page.evaluate(hide, False)
    wait_for_newer(page, service)
    assert times(page, "/v1/prices/stream") == 2


def test_hostile_names_are_only_text(page: Any, service: Service) -> None:
    key = service.make_key(HOSTILE)
    request_id = ask(service, key, MODEL, **{"class": HOSTILE}, session=HOSTILE)
    page.goto(f"{service.url}/#key={service.key}")
    text = decision(page, request_id).inner_text()
    assert f"{HOSTILE} · {HOSTILE}" in text
    assert f"session {HOSTILE}" in text
    assert MODEL in text
    page.get_by_role("cell", name=f"tenant {HOSTILE}").wait_for()
    assert page.locator("main img, main script, main iframe, main a, main [onerror]").count() == 0


def test_the_policy_stops_what_a_flaw_would_let_in(page: Any, service: Service) -> None:
    page.goto(service.url)
    stopped = "url => fetch(url).then(() => false, () => true)"
    assert page.evaluate(stopped, "http://127.0.0.1:9/")
    held = """() => new Promise(done => { document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective));
        document.body.append(Object.assign(new Image(), { src: "/never.png" })); })"""
    assert page.evaluate(held) == "img-src"
    # A new element's handler would run here, had a name become markup after all.
    run = "() => { document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.ran = 1\">x</b>'); document.body.lastChild.click(); return window.ran; }"
    assert page.evaluate(run) is None


def test_without_a_key_it_asks_for_one_and_says_what_is_wrong(page: Any, service: Service) -> None:
    page.goto(service.url)
    page.get_by_text("a key is needed").wait_for()
    assert page.locator("main").is_hidden()
    page.get_by_label("API key").fill("wl-wrong")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("this key is not known").wait_for()
    own = service.make_key("small-firm")
    page.get_by_label("API key").fill(own)
    page.get_by_role("button", name="Show").click()
    page.get_by_role("cell", name="tenant small-firm").wait_for()
    assert page.get_by_text("all keys together").count() == 0, "a tenant sees its own"
    assert page.locator("#ask").is_hidden()
    assert own not in page.content()


CONTRAST = """() => { const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const lit = c => parse(c).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const paper = lit(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("body *")].filter(e => e.childNodes.length && e.offsetParent && !e.matches("script, style"))
    .map(e => { const ink = lit(getComputedStyle(e).color); return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); })
    .reduce((a, b) => Math.min(a, b)); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well_in_both_schemes_and_on_a_small_screen(
    page: Any, service: Service, scheme: str
) -> None:
    request_id = ask(service, service.key, MODEL)
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{service.url}/#key={service.key}")
    decision(page, request_id)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    assert page.evaluate(CONTRAST) >= 4.5, "WCAG AA"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_says_so_when_the_service_is_gone(browser: Any, tmp_path: Path) -> None:
    with running(tmp_path) as other:
        page = browser.new_page()
        page.goto(f"{other.url}/#key={other.key}")
        page.get_by_text("live", exact=True).wait_for(timeout=SOON_MS)
        other.kill()
        page.get_by_text("the service does not answer").wait_for(timeout=SOON_MS)
        page.close()
