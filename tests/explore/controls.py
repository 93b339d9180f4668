"""What the explorer's page shows, and moving each of its controls."""


def drawing(page):
    """Everything that the sections show."""
    return page.evaluate("[...document.querySelectorAll('.ablations section')].map((part) => part.innerHTML)")


def move_every_control(page):
    """Choose every option of every list: each changes the picture and the address, which brings the picture back."""
    names = page.evaluate("[...document.querySelectorAll('.controls select')].map((node) => node.dataset.key)")
    assert names == [f"select {name}" for name in ("study", "measure", "switch", "a", "b", "columns", "rows")]
    for name in names[1:]:
        select = page.locator(f"[data-key='{name}']")
        start, before, address = select.input_value(), drawing(page), page.evaluate("location.hash")
        for value in select.locator("option").evaluate_all("(options) => options.map((option) => option.value)"):
            if value != start:
                select.select_option(value)
                assert select.input_value() == value
                assert drawing(page) != before, f"{name} = {value}"
                assert page.evaluate("location.hash") != address
                page.evaluate("(hash) => { location.hash = hash; }", address)
                page.wait_for_function(
                    "([name, value]) => document.querySelector(`[data-key='${name}']`).value === value",
                    arg=[name, start],
                )
                assert drawing(page) == before, f"{name} back to {start}"
