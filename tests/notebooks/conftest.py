"""At the end of a test run: what every notebook took."""


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "notebook")
    if rows:
        terminalreporter.section("notebooks at smoke size")
        for name, seconds, gib in rows:
            terminalreporter.write_line(f"{name:24} {seconds:5.0f} s {gib:6.2f} GiB")
        total = sum(seconds for _, seconds, _ in rows)
        terminalreporter.write_line(f"{'all':24} {total:5.0f} s")
