"""The pages, as a reader's browser shows them."""

from pathlib import Path


def opened(browser, file: Path, width: int, fragment: str = ""):
    """The page at a width, where its address says so, and what went wrong on it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(file.as_uri() + fragment)
    if page.locator("#results-table").count():
        page.wait_for_selector("#results-table.dataTable")  # it is unpacked first
    return page, wrong


CUT_OFF = """() => [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  const inside = element.closest(".scroll, svg");
  return box.width > 0 && !inside && (box.right > innerWidth + 1 || box.left < -1);
}).map(element => element.outerHTML.slice(0, 80))"""
