"""What a test sees of a page, and what it keeps of one that is not as it should be."""

import pytest

from tests import browser

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
HELLO = "data:text/html,<title>t</title><h1>Hello</h1><script>setTimeout(() => document.title = 'later', 700)</script>"


def test_a_page_is_asked_until_it_is_good():
    with browser.opened(HELLO) as page:
        assert page.until("document.title", lambda title: title == "later") == "later"
        assert page.ask("[...document.querySelectorAll('h1')].map(h => h.innerText)") == ["Hello"]
        assert page.ask("nothing.of.that.name") is None


def test_what_a_page_showed_is_kept_when_a_test_fails(tmp_path, monkeypatch):
    monkeypatch.setenv(browser.SHOTS, str(tmp_path / "shots"))
    with pytest.raises(AssertionError, match=r"after 0 s the page still has 'Hello'") as failed:
        wait_for_goodbye()
    [folder] = (tmp_path / "shots").iterdir()
    assert failed.value.__notes__ == [f"what the page showed is in {folder}"]
    assert (folder / "page.txt").read_text() == f"{HELLO}\n\nHello"
    assert (folder / "page.png").read_bytes().startswith(b"\x89PNG")


def wait_for_goodbye():
    heading = "document.querySelector('h1').innerText"
    with browser.opened(HELLO) as page:
        page.until(heading, lambda text: text == "Hello")
        page.until(heading, lambda text: text == "Goodbye", seconds=0)
