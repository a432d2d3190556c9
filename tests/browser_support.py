"""What the tests of the pages in a real browser share beside conftest's `browser`: waiting for what a page shows."""

import time

FOCUS = "document.activeElement.hasAttribute('autofocus')"  # comes a moment after the page: keys pressed before it are lost


def until(page, expression: str, given=None, seconds: float = 60.0) -> None:
    """Wait for an expression to hold. (Playwright's own wait compiles text in the page, which its policy forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression, given):
        assert time.monotonic() < end, f"never: {expression} {given or ''}\n{page.inner_text('body')[:3000]}"
        time.sleep(0.02)
